from __future__ import annotations

import torch
from torch import nn

from model.conv_norm import ConvNorm
from model.fpn import FPN


def _pass_through(fpn: FPN) -> None:
    """Every convolution hands its one channel on as it is."""
    for part in fpn.modules():
        if isinstance(part, ConvNorm):
            nn.init.dirac_(part.conv.weight)
            assert part.conv.bias is not None
            nn.init.zeros_(part.conv.bias)


@torch.inference_mode()
def test_levels_are_sums_down_the_pyramid() -> None:
    fpn = FPN((1, 1, 1, 1), 1, norm=None)
    _pass_through(fpn)
    features = [torch.full((1, 1, 32 // 2**level, 64 // 2**level), 10.0**level) for level in range(4)]
    levels = fpn(features)
    assert [float(level.mean()) for level in levels] == [1111.0, 1110.0, 1100.0, 1000.0, 1000.0]
    assert [tuple(level.shape[2:]) for level in levels] == [(32, 64), (16, 32), (8, 16), (4, 8), (2, 4)]


@torch.inference_mode()
def test_upsampling_repeats_the_nearest_and_p6_takes_every_other() -> None:
    fpn = FPN((1, 1), 1, norm=None)
    _pass_through(fpn)
    c5 = torch.arange(6.0).view(1, 1, 2, 3)
    p4, p5, p6 = fpn([torch.zeros(1, 1, 4, 6), c5])
    assert torch.equal(p5, c5)
    assert p4[0, 0].tolist() == [[float(y // 2 * 3 + x // 2) for x in range(6)] for y in range(4)]
    assert p6[0, 0].tolist() == [[0.0, 2.0]]


@torch.inference_mode()
def test_a_level_of_any_size_gets_the_nearest_cells() -> None:
    fpn = FPN((1, 1), 1, norm=None)
    _pass_through(fpn)
    c4, c5 = torch.zeros(2, 1, 5, 7), torch.rand(2, 1, 3, 4)
    p4 = fpn([c4, c5])[0]
    rows, columns = torch.arange(5) * 3 // 5, torch.arange(7) * 4 // 7
    assert torch.equal(p4, c5[:, :, rows][..., columns])

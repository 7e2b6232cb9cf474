"""A convolution in training on a GPU, with what follows it, against torch's operators in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.conv_norm import ConvNorm
from model.norm import Norm, norm_of

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
FROZEN, BATCH = norm_of("frozen", 1e-5), norm_of("batch", 1e-5)


def layer(*channels: int, norm: Norm | None, **options: Any) -> ConvNorm:
    torch.manual_seed(0)
    module = ConvNorm(*channels, norm=norm, **options)
    for name, value in module.named_buffers():
        if value.is_floating_point():
            value.uniform_(0.5 if name.endswith("var") else -0.5, 1.5)
    for name, parameter in module.named_parameters():
        if "conv.weight" not in name:
            nn.init.uniform_(parameter, -1, 1)
    module.to(GPU).to(memory_format=torch.channels_last)
    return module


def in_float32(module: ConvNorm, x: Tensor, plus: Tensor | None, found: Tensor) -> Tensor:
    """By torch's operators, one after the other; the ReLU lets through what it let through in `found`, which near zero
    a rounding decides."""
    conv = module.conv
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if isinstance(module.norm, nn.BatchNorm2d):
        y = F.batch_norm(y, None, None, module.norm.weight, module.norm.bias, training=True, eps=module.norm.eps)
    elif module.norm is not None:
        y = module.norm(y)
    y = y if plus is None else y + plus
    return y * (found > 0) if module.relu else y


def gradients(maps: Tensor, of: Sequence[Tensor], seed: int) -> list[Tensor]:
    weight = torch.randn(maps.shape, generator=torch.Generator().manual_seed(seed)).to(GPU)
    return list(torch.autograd.grad((maps.float() * weight).sum(), of))


@pytest.mark.parametrize("norm", [None, FROZEN, BATCH], ids=["bias", "frozen", "batch"])
@pytest.mark.parametrize("with_plus", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "groups"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4)], ids=str
)
def test_it_is_torchs(
    norm: Norm | None, with_plus: bool, relu: bool, kernel_size: int, stride: int, groups: int
) -> None:
    module = layer(32, 64, norm=norm, kernel_size=kernel_size, stride=stride, groups=groups, relu=relu)
    x = torch.randn(2, 32, 17, 22, device=GPU).contiguous(memory_format=torch.channels_last).requires_grad_()
    plus = None
    if with_plus:
        plus = torch.randn(2, 64, -(-17 // stride), -(-22 // stride), device=GPU)
        plus = plus.contiguous(memory_format=torch.channels_last).requires_grad_()
    of = [x, *module.parameters(), *([] if plus is None else [plus])]
    with torch.autocast("cuda", torch.bfloat16):
        found = module(x, None if plus is None else plus.to(torch.bfloat16))
    expected = in_float32(module, x, plus, found)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.01 * expected.norm()
    for ours, theirs in zip(gradients(found, of, 1), gradients(expected, of, 1), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("norm", [FROZEN, BATCH], ids=["frozen", "batch"])
@pytest.mark.parametrize("size", [(64, 96), (63, 97)], ids=str)  # odd sides go another way
def test_the_stem_is_torchs(norm: Norm, size: tuple[int, int]) -> None:
    module = layer(3, 64, norm=norm, kernel_size=7, stride=2)
    x = torch.randn(2, 3, *size, device=GPU).contiguous(memory_format=torch.channels_last)
    of = list(module.parameters())
    with torch.autocast("cuda", torch.bfloat16):
        found = module(x)
    expected = in_float32(module, x, None, found)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 0.01 * expected.norm()
    for ours, theirs in zip(gradients(found, of, 1), gradients(expected, of, 1), strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_no_regions_have_no_maps() -> None:
    module = layer(32, 64, norm=None, kernel_size=3)
    x = torch.zeros(0, 32, 14, 14, device=GPU, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        maps = module(x)
    assert maps.shape == (0, 64, 14, 14)
    for gradient in gradients(maps, [x, *module.parameters()], 1):
        assert not gradient.any()


def test_what_is_no_number_does_not_vanish() -> None:
    module = layer(32, 64, norm=None, kernel_size=3)
    x = torch.randn(1, 32, 8, 8, device=GPU).contiguous(memory_format=torch.channels_last)
    x[0, 0, 4, 4] = torch.nan
    with torch.autocast("cuda", torch.bfloat16):
        assert module(x)[:, :, 4, 4].isnan().all()

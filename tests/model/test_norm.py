from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from model.norm import FrozenNorm, norm_of


@pytest.mark.parametrize("kind", ["frozen", "batch", "sync"])
@torch.inference_mode()
def test_at_inference_each_is_torchs_to_the_last_bit(kind: str) -> None:
    ours = norm_of(kind, 1e-5)(16).eval()  # type: ignore[arg-type]
    theirs = FrozenBatchNorm2d(16) if kind == "frozen" else nn.BatchNorm2d(16).eval()
    for name, low, high in (("weight", -1, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.1, 3)):
        getattr(ours, name).data.uniform_(low, high)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 16, 13, 11)
    assert torch.equal(theirs(x), ours(x.clone()))


def test_a_frozen_norm_by_hand_and_nothing_of_it_trains() -> None:
    norm = norm_of("frozen", 1.0)(1)
    for name, value in (("weight", 4.0), ("bias", 1.0), ("running_mean", 2.0), ("running_var", 3.0)):
        norm.get_buffer(name).fill_(value)
    # by hand: 5 - 2 over the root of 3 + 1, times 4, plus 1
    assert norm(torch.full((1, 1, 1, 1), 5.0)).item() == 7.0
    assert not list(norm.parameters())
    assert norm.training


def test_kept_scale_and_shift_follow_the_buffers() -> None:
    norm = norm_of("frozen", 1e-5)(8)
    assert isinstance(norm, FrozenNorm)
    first = norm.kept_scale_and_shift()
    assert norm.kept_scale_and_shift() is first
    other = {name: torch.rand(8) + 0.5 for name in norm.state_dict()}
    changes: list[Callable[[], object]] = [
        lambda: norm.get_buffer("bias").add_(1),
        lambda: norm.load_state_dict(other),
        lambda: norm.load_state_dict({name: value * 2 for name, value in other.items()}, assign=True),
        norm.double,
    ]
    for change in changes:
        change()
        with torch.inference_mode():  # must not keep what no gradient may go through
            norm.kept_scale_and_shift()
        scale, shift = norm.kept_scale_and_shift()
        assert not scale.is_inference()
        for kept, fresh in zip((scale, shift), norm.scale_and_shift(), strict=True):
            assert torch.equal(kept, fresh)
    copied = copy.deepcopy(norm)
    copied.get_buffer("running_var").fill_(4.0)
    assert torch.equal(copied.kept_scale_and_shift()[0], copied.scale_and_shift()[0])


def test_a_group_norm_takes_no_notice_of_the_batch() -> None:
    norm = norm_of("group", 1e-5)(64)
    x = torch.randn(3, 64, 5, 7)
    together = norm(x)
    for index in range(3):
        torch.testing.assert_close(norm(x[index : index + 1]), together[index : index + 1])
    # 32 groups of 2 channels: each has mean 0 and deviation 1
    torch.testing.assert_close(together.view(3, 32, -1).mean(-1), torch.zeros(3, 32), atol=1e-5, rtol=0)

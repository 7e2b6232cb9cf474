"""Sums and maxima of whole maps against torch's operators and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from model.kernels.maps import add_in_training, add_to_map, max_pool
from tests.model.kernels.compiling import compiled_ptx

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_map(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def test_a_sum_by_hand() -> None:
    # Two cells of a row, one channel; the one coarse cell covers both.
    x = torch.tensor([[[[1.0, 2.0]]]], device=DEVICE).contiguous(memory_format=torch.channels_last)
    coarse = torch.full((1, 1, 1, 1), 10.0, device=DEVICE)
    found = add_to_map(x, torch.tensor([100.0], device=DEVICE), coarse)
    assert found is x
    assert found.flatten().tolist() == [111.0, 112.0]


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 5, 16]), st.integers(1, 7), st.integers(1, 9)),
    with_bias=st.booleans(),
    coarser=st.sampled_from([None, 1, 2]),
    relu=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_sums_are_torchs(
    seed: int, shape: tuple[int, int, int, int], with_bias: bool, coarser: int | None, relu: bool
) -> None:
    num_images, channels, height, width = shape
    x = random_map(seed, *shape)
    bias = torch.arange(float(channels), device=DEVICE) if with_bias else None
    coarse = None
    if coarser is not None:
        coarse = random_map(seed + 1, num_images, channels, -(-height // coarser), -(-width // coarser))
    expected = x.clone()
    if bias is not None:
        expected = expected + bias[:, None, None]
    if coarse is not None:
        expected = expected + F.interpolate(coarse, size=(height, width), mode="nearest")
    expected = expected.relu() if relu else expected
    assert torch.equal(add_to_map(x, bias, coarse, relu=relu), expected)


def test_what_is_no_number_stays_so() -> None:
    x = torch.tensor([[[[torch.nan, -1.0]]]], device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert add_to_map(x, relu=True).flatten().nan_to_num(7).tolist() == [7.0, 0.0]


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(0, 2), st.sampled_from([1, 5, 16]), st.integers(1, 6), st.integers(1, 6)),
    coarser=st.sampled_from([None, 1, 2]),
    relu=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_gradients_are_torchs(seed: int, shape: tuple[int, int, int, int], coarser: int | None, relu: bool) -> None:
    num_images, channels, height, width = shape
    start, weight = random_map(seed, *shape), random_map(seed + 1, *shape)
    plus = random_map(seed + 2, num_images, channels, -(-height // (coarser or 1)), -(-width // (coarser or 1)))
    found = []
    for add in (add_in_training, _add_by_torch):
        leaves = [one.clone(memory_format=torch.preserve_format).requires_grad_() for one in (start, plus)]
        added = add(leaves[0] * 1, leaves[1] if coarser else None, relu=relu)
        (added * weight).sum().backward()  # type: ignore[no-untyped-call]
        found.append([added.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def _add_by_torch(x: Tensor, plus: Tensor | None, *, relu: bool) -> Tensor:
    if plus is not None:  # torch enlarges no empty maps
        x = x + (F.interpolate(plus, size=x.shape[-2:], mode="nearest") if x.numel() > 0 else plus.sum())
    return x.relu() if relu else x


def test_a_maximum_by_hand() -> None:
    x = torch.arange(12.0, device=DEVICE).view(1, 1, 3, 4).contiguous(memory_format=torch.channels_last)
    # Windows around cells (0, 0), (0, 2), (2, 0) and (2, 2).
    assert max_pool(x, (3, 4)).flatten().tolist() == [5.0, 7.0, 9.0, 11.0]
    # Of the upper left 2 × 3 cells, windows around (0, 0) and (0, 2).
    assert max_pool(x, (2, 3)).flatten().tolist() == [5.0, 6.0]


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 5, 16]), st.integers(1, 8), st.integers(1, 9)),
    cut=st.integers(0, 1),
)
@settings(deadline=None, max_examples=25)
def test_maxima_are_torchs(seed: int, shape: tuple[int, int, int, int], cut: int) -> None:
    x = random_map(seed, *shape)
    height, width = max(1, shape[2] - cut), max(1, shape[3] - cut)
    expected = F.max_pool2d(x[:, :, :height, :width], kernel_size=3, stride=2, padding=1)
    assert torch.equal(max_pool(x, (height, width)), expected)


def test_bfloat16_is_rounded_once() -> None:
    x = random_map(0, 1, 8, 4, 6, dtype=torch.bfloat16)
    bias, coarse = (
        random_map(1, 1, 8, 1, 1, dtype=torch.bfloat16).flatten(),
        random_map(2, 1, 8, 2, 3, dtype=torch.bfloat16),
    )
    exact = x.float() + bias.float()[:, None, None] + F.interpolate(coarse.float(), size=(4, 6), mode="nearest")
    found = add_to_map(x.clone(memory_format=torch.channels_last), bias, coarse).float()
    step = 1 if DEVICE == "cpu" else 0.5  # the interpreter truncates
    assert ((found - exact).abs() <= exact.abs() * step * 2**-7 + 1e-30).all()


def test_maps_in_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match="channels-last"):
        add_to_map(torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="channels-last"):
        max_pool(torch.zeros(2, 3, 4, 5), (4, 5))


@pytest.mark.slow  # a compiler starts anew for each
@pytest.mark.parametrize("kernel", ["add", "pool"])
def test_compiles_for_hopper(kernel: str, tmp_path: Path) -> None:
    sizes = {
        "add": ["height", "width", "coarse_height", "coarse_width"],
        "pool": ["height", "width", "row_cells", "image_cells"],
    }[kernel]
    maps = {"add": ["x", "bias", "coarse"], "pool": ["x", "pooled"]}[kernel]
    signature = dict.fromkeys(maps, "*bf16") | dict.fromkeys(["num_elements", *sizes], "i32")
    choices = {"add": {"SAME": True, "RELU": True}, "pool": {}}[kernel] | {"CHANNELS": 256, "BLOCK": 1024}
    signature |= dict.fromkeys(choices, "constexpr")
    compiled_ptx(f"model.kernels.maps:{kernel}", signature, choices, tmp_path, enable_fp_fusion=True)

"""The stem's maximum and its gradient against torch's operator for CPUs and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from model.kernels import pool_in_training
from model.kernels.pool_in_training import max_pool_in_training
from tests.model.kernels.compiling import compiled_ptx

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Up to several blocks of elements, and blocks that end within a cell, a row or an image.
shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 64, 192]), st.integers(1, 9), st.integers(1, 9))


def channels_last(x: Tensor) -> Tensor:
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last)


def integer_map(seed: int, shape: tuple[int, ...], largest: int = 2) -> Tensor:
    """Of so few values that many windows have several cells that are largest."""
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def by_torch(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What is pooled and the gradient of `x`, on the CPU, in its dtype."""
    leaf = x.detach().cpu().requires_grad_()
    pooled = F.max_pool2d(leaf, kernel_size=3, stride=2, padding=1)
    pooled.backward(gradient.cpu())  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return pooled.detach(), leaf.grad


def by_us(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The same from `max_pool_in_training`, both seen to be channels-last."""
    leaf = channels_last(x.detach().clone()).requires_grad_()
    pooled = max_pool_in_training(leaf)
    pooled.backward(gradient.to(DEVICE))  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    for made in (pooled, leaf.grad):
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert made.dtype == x.dtype
    return pooled.detach().cpu(), leaf.grad.cpu()


def test_a_maximum_and_its_gradient_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 9.0, 9.0, 1.0], [0.0, 4.0, 5.0, 6.0]]).view(1, 1, 3, 4)
    pooled, gradient = by_us(x, torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]]))
    # Windows around cells (0, 0), (0, 2), (2, 0) and (2, 2) all hold the first 9, which gets all four gradients.
    assert pooled.flatten().tolist() == [9.0, 9.0, 9.0, 9.0]
    assert gradient.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1111.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@given(seed=st.integers(0, 2**32), shape=shapes)
@settings(deadline=None, max_examples=30)
def test_maxima_and_gradients_are_torchs_bit_for_bit(seed: int, shape: tuple[int, int, int, int]) -> None:
    num_images, channels, height, width = shape
    pooled_shape = (num_images, channels, -(-height // 2), -(-width // 2))
    gradient = torch.randn(pooled_shape, generator=torch.Generator().manual_seed(seed + 1))
    x = channels_last(integer_map(seed, shape))
    for ours, theirs in zip(by_us(x, gradient), by_torch(x, gradient), strict=True):
        assert torch.equal(ours, theirs)


def test_a_window_of_nothing_but_minus_infinity_gives_its_first_cell_the_gradient() -> None:
    x = torch.full((1, 2, 5, 4), -torch.inf)
    gradient = torch.arange(1.0, 13.0).view(1, 2, 3, 2)
    for ours, theirs in zip(by_us(x, gradient), by_torch(x, gradient), strict=True):
        assert torch.equal(ours, theirs)


@given(seed=st.integers(0, 2**32), height=st.integers(1, 7), width=st.integers(1, 7))
@settings(deadline=None, max_examples=15)
def test_what_is_no_number_is_the_largest(seed: int, height: int, width: int) -> None:
    x = integer_map(seed, (1, 5, height, width))
    x = x.masked_fill(x == 0, torch.nan).masked_fill(x == 1, torch.inf)
    gradient = integer_map(seed + 1, (1, 5, -(-height // 2), -(-width // 2)))
    pooled, of_x = by_us(x, gradient)
    expected, of_x_by_torch = by_torch(x, gradient)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(of_x, of_x_by_torch)


def test_bfloat16_is_rounded_once() -> None:
    x = integer_map(0, (2, 64, 6, 7)).bfloat16()
    gradient = torch.randn((2, 64, 3, 4), generator=torch.Generator().manual_seed(1)).bfloat16()
    pooled, of_x = by_us(x, gradient)
    expected, exact = by_torch(x.float(), gradient.float())
    assert torch.equal(pooled.float(), expected)
    step = 1 if DEVICE == "cpu" else 0.5  # the interpreter truncates
    assert ((of_x.float() - exact).abs() <= exact.abs() * step * 2**-7 + 1e-30).all()


def test_a_gradient_may_be_in_another_order() -> None:
    x = integer_map(0, (2, 5, 6, 7))
    gradient = integer_map(1, (2, 5, 3, 4), largest=9)
    for other in (gradient, gradient.transpose(2, 3).contiguous().transpose(2, 3), gradient[:1, :1].expand(2, 5, 3, 4)):
        assert not other.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(by_us(x, other)[1], by_torch(x, other)[1])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_maps(shape: tuple[int, int, int, int]) -> None:
    leaf = channels_last(torch.zeros(shape)).requires_grad_()
    pooled = max_pool_in_training(leaf)
    assert pooled.shape == (shape[0], shape[1], -(-shape[2] // 2), -(-shape[3] // 2))
    pooled.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad.shape == shape


def test_maps_in_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match="channels-last"):
        max_pool_in_training(torch.zeros(2, 3, 4, 5))


def test_no_index_is_kept_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    indices: list[Tensor | None] = []
    pool = pool_in_training._pool

    def recorded(x: Tensor, kept: Tensor | None) -> Tensor:
        indices.append(kept)
        return pool(x, kept)

    monkeypatch.setattr(pool_in_training, "_pool", recorded)
    x = channels_last(integer_map(0, (1, 5, 4, 6)))
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        found = [max_pool_in_training(leaf)]
    found.append(max_pool_in_training(x))
    assert indices == [None, None]
    found.append(max_pool_in_training(leaf).detach())
    assert indices[2] is not None
    assert indices[2].dtype == torch.uint8
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@pytest.mark.slow  # a compiler starts anew for each
@pytest.mark.parametrize(
    ("kernel", "maps"),
    [
        ("pool_and_keep", {"x": "*bf16", "pooled": "*bf16", "kept": "*u8"}),
        ("pool_and_keep", {"x": "*bf16", "pooled": "*bf16"}),
        ("gather_gradients", {"of_pooled": "*bf16", "kept": "*u8", "of_x": "*bf16"}),
    ],
)
def test_compiles_for_hopper(kernel: str, maps: dict[str, str], tmp_path: Path) -> None:
    signature = maps | dict.fromkeys(["num_elements", "height", "width"], "i32")
    choices = {"CHANNELS": 64, "BLOCK": 1024} | ({} if "kept" in maps else {"kept": None})
    signature |= dict.fromkeys(choices, "constexpr")
    compiled_ptx(f"model.kernels.pool_in_training:{kernel}", signature, choices, tmp_path, enable_fp_fusion=True)

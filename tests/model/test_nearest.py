"""The pyramid's sum and its gradients against torch's own enlarging and addition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.nearest import add_nearest


def test_one_coarse_cell_covers_four_by_hand() -> None:
    coarser = torch.tensor([[[[10.0]]]], requires_grad=True)
    lateral = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    added = add_nearest(lateral * 1, coarser)
    assert added.tolist() == [[[[11.0, 12.0], [13.0, 14.0]]]]
    torch.autograd.backward(added, torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]]))
    assert coarser.grad is not None
    assert coarser.grad.item() == 15.0
    assert lateral.grad is not None
    assert lateral.grad.tolist() == [[[[1.0, 2.0], [4.0, 8.0]]]]


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    by=st.sampled_from([1, 2, 3]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_sums_and_gradients_are_torchs(
    seed: int, shape: tuple[int, int, int, int], by: int, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_images, channels, height, width = shape

    def leaf(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(memory_format=memory_format).requires_grad_()

    lateral, coarser = leaf(*shape), leaf(num_images, channels, -(-height // by), -(-width // by))
    expected = lateral + F.interpolate(coarser, size=(height, width), mode="nearest")
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    torch.autograd.backward(expected, gradient)
    wanted = (lateral.grad, coarser.grad)
    lateral.grad = coarser.grad = None
    found = add_nearest(lateral * 1, coarser)
    assert torch.equal(found, expected)
    torch.autograd.backward(found, gradient)
    torch.testing.assert_close((lateral.grad, coarser.grad), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("size", [(4, 6), (3, 5)], ids=str)
def test_the_dtypes_are_those_of_the_maps(size: tuple[int, int]) -> None:
    # under autocast a pyramid with norms has wider coarse maps than lateral ones
    lateral = torch.ones(1, 2, *size, dtype=torch.bfloat16, requires_grad=True)
    coarser = torch.ones(1, 2, 2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        added = add_nearest(lateral * 1, coarser)
    assert added.dtype == torch.bfloat16
    torch.autograd.backward(added.sum())
    assert lateral.grad is not None
    assert coarser.grad is not None
    assert (lateral.grad.dtype, coarser.grad.dtype) == (torch.bfloat16, torch.float32)
    assert coarser.grad.sum() == 2 * size[0] * size[1]

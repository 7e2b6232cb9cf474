"""Multi-level RoIPool against a loop, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.roi_pool import multilevel_roi_pool
from tests.reference import roi_align as level_reference
from tests.reference import roi_pool as reference

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 192, 256


def random_pyramid(seed: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Maps of two 192 × 256 inputs."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, HEIGHT // stride, WIDTH // stride, generator=random).to(dtype) for stride in STRIDES]


def random_boxes(seed: int, num_boxes: int) -> tuple[Tensor, Tensor]:
    """Boxes on a grid of 2 px, so that many edges are halves, of all sizes, some outside, some without extent."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.randint(-30, 140, (num_boxes, 2), generator=random)
    extent = (torch.rand(num_boxes, 2, generator=random) ** 3 * 250).int()
    extent[::7] = 0
    return 2.0 * torch.cat([corner, corner + extent], dim=1), torch.randint(2, (num_boxes,), generator=random)


def pool_by_hand(box: list[float], output_size: int = 2) -> list[list[float]]:
    """From one map of 6 × 6 cells at stride 4 that count up row by row."""
    ramp = torch.arange(36.0).view(1, 1, 6, 6)
    image_index = torch.zeros(1, dtype=torch.int64)
    pooled = multilevel_roi_pool([ramp], [4], torch.tensor([box]), image_index, output_size=output_size)
    rows: list[list[float]] = pooled[0, 0].tolist()
    return rows


def test_edges_are_rounded_to_whole_cells() -> None:
    # 5 and 17 px are cells 1.25 and 4.25: columns 1 to 4, two to a bin; rows 1.5 → 2 to 3, one to a bin.
    assert pool_by_hand([5, 6, 17, 13]) == [[2 * 6 + 2, 2 * 6 + 4], [3 * 6 + 2, 3 * 6 + 4]]
    # Within the same cells nothing changes: what RoIAlign was made for.
    assert pool_by_hand([3, 7, 16, 12]) == pool_by_hand([5, 6, 17, 13])


def test_bins_of_part_of_a_cell_share_it() -> None:
    # Three cells in two bins of 1.5: 0 to 1 and 1 to 2.
    assert pool_by_hand([0, 0, 8, 8]) == [[1 * 6 + 1, 1 * 6 + 2], [2 * 6 + 1, 2 * 6 + 2]]


def test_a_box_without_extent_is_one_cell() -> None:
    assert pool_by_hand([8, 12, 8, 12]) == [[3 * 6 + 2] * 2] * 2


def test_outside_the_map_there_is_nothing() -> None:
    # Columns 4 to 7 of 0 to 5: the second bin has no cells.
    assert pool_by_hand([16, 0, 28, 4]) == [[5, 0], [6 + 5, 0]]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), output_size=st.sampled_from([1, 2, 5, 7]))
def test_agrees_with_the_loop(seed: int, output_size: int) -> None:
    features = random_pyramid(seed)
    boxes, image_index = random_boxes(seed, 5)
    pooled = multilevel_roi_pool(features, STRIDES, boxes, image_index, output_size=output_size)
    for box, image, maps in zip(boxes.double().numpy(), image_index.tolist(), pooled, strict=True):
        level = level_reference.level(box, len(features))
        planes = features[level][image].double().numpy()
        expected = [reference.roi_pool(plane, box, STRIDES[level], output_size=output_size) for plane in planes]
        np.testing.assert_array_equal(maps.numpy(), np.stack(expected))


def test_boxes_do_not_affect_each_other() -> None:
    features = random_pyramid(1)
    boxes, image_index = random_boxes(1, 200)
    pooled = multilevel_roi_pool(features, STRIDES, boxes, image_index, output_size=7)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    again = multilevel_roi_pool(features, STRIDES, boxes[shuffle], image_index[shuffle], output_size=7)
    assert torch.equal(again, pooled[shuffle])


def test_shifting_box_and_map_together_changes_nothing() -> None:
    features = random_pyramid(3)
    box, image_index = torch.tensor([[61.0, 50, 101, 99]]), torch.tensor([1])  # level 2, inside
    shifted = [torch.roll(feature, (2, 3), dims=(2, 3)) for feature in features]
    moved = box + torch.tensor([12, 8, 12, 8])
    assert torch.equal(
        multilevel_roi_pool(shifted, STRIDES, moved, image_index, output_size=7),
        multilevel_roi_pool(features, STRIDES, box, image_index, output_size=7),
    )


def test_bfloat16_is_pooled_without_rounding() -> None:
    features = random_pyramid(4, dtype=torch.bfloat16)
    boxes, image_index = random_boxes(4, 60)
    boxes += 1.125  # what bfloat16 would round
    pooled = multilevel_roi_pool(features, STRIDES, boxes, image_index, output_size=7)
    assert pooled.dtype == torch.bfloat16
    precise = [feature.float() for feature in features]
    assert torch.equal(pooled.float(), multilevel_roi_pool(precise, STRIDES, boxes, image_index, output_size=7))


def test_gradients_are_those_of_the_function() -> None:
    features = [torch.randn(2, 2, 8 // scale, 12 // scale, dtype=torch.float64, requires_grad=True) for scale in (1, 2)]
    boxes = torch.tensor([[3.0, 2, 40, 30], [0, 0, 0, 0], [-60, -60, 200, 200], [10, 6, 26, 30]])

    def pool(*levels: Tensor) -> Tensor:
        return multilevel_roi_pool(levels, (4, 8), boxes, torch.tensor([0, 1, 1, 0]), output_size=3)

    assert torch.autograd.gradcheck(pool, features)


def test_a_cell_learns_from_each_bin_it_is_the_largest_of() -> None:
    feature = torch.arange(36.0).view(1, 1, 6, 6).requires_grad_()
    # Three cells in two bins a side, as above: cells 7, 8, 13 and 14; the box is there twice.
    boxes = torch.tensor([[0.0, 0, 8, 8]] * 2)
    pooled = multilevel_roi_pool([feature], [4], boxes, torch.tensor([0, 0]), output_size=2)
    (gradient,) = torch.autograd.grad(pooled.sum(), feature)
    assert gradient.flatten().nonzero().flatten().tolist() == [7, 8, 13, 14]
    assert gradient.sum() == 8


@pytest.mark.parametrize("edge", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite_pools_zeros(edge: float) -> None:
    features = random_pyramid(5)
    boxes, image_index = random_boxes(5, 3)
    spoilt = boxes.clone()
    spoilt[1, 2] = edge
    pooled = multilevel_roi_pool(features, STRIDES, spoilt, image_index, output_size=7)
    expected = multilevel_roi_pool(features, STRIDES, boxes, image_index, output_size=7)
    assert torch.equal(pooled[1], torch.zeros_like(pooled[1]))
    assert torch.equal(pooled[[0, 2]], expected[[0, 2]])


def test_no_boxes_pool_to_nothing() -> None:
    boxes, image_index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    features = [feature.requires_grad_() for feature in random_pyramid(6)]
    pooled = multilevel_roi_pool(features, STRIDES, boxes, image_index, output_size=7)
    assert pooled.shape == (0, 3, 7, 7)
    for gradient in torch.autograd.grad(pooled.sum(), features):
        assert not gradient.any()


def test_as_many_strides_as_maps() -> None:
    with pytest.raises(ValueError, match="4 and 1"):
        multilevel_roi_pool(random_pyramid(7), [4], *random_boxes(7, 1), output_size=7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype: torch.dtype) -> None:
    features = random_pyramid(8, dtype=dtype)
    boxes, image_index = random_boxes(8, 200)
    on_cuda = [feature.cuda() for feature in features]
    pooled = multilevel_roi_pool(on_cuda, STRIDES, boxes.cuda(), image_index.cuda(), output_size=7)
    assert torch.equal(pooled.cpu(), multilevel_roi_pool(features, STRIDES, boxes, image_index, output_size=7))

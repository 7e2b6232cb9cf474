"""Keypoint targets against a loop, against torchvision, and by hand."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.roi_heads import keypoints_to_heatmap

from model.keypoint_targets import heatmap_targets
from tests.reference import keypoint_targets as reference


def random_case(seed: int, *, num_regions: int = 6, num_keypoints: int = 9) -> tuple[Tensor, Tensor]:
    """Keypoints on a coarse grid, so that many lie on an edge of a cell or of a box, and boxes without decimals."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.randint(8, (num_regions, 2), generator=random)
    boxes = torch.cat([corner, corner + 2 ** torch.randint(1, 5, (num_regions, 2), generator=random)], dim=1).float()
    points = torch.randint(40, (num_regions, num_keypoints, 2), generator=random) / 2
    visibility = torch.randint(3, (num_regions, num_keypoints, 1), generator=random)
    return torch.cat([points, visibility], dim=2), boxes


def test_cells_by_hand() -> None:
    # A box of 8 × 4 at (10, 20) and 4 × 4 cells of 2 × 1 px.
    box = torch.tensor([[10.0, 20, 18, 24]])
    cases = {
        (10.0, 20.0, 2.0): 0,
        (12.0, 20.0, 2.0): 1,  # a border belongs to the cell on its right
        (11.9, 21.5, 1.0): 4,  # labelled but hidden
        (18.0, 22.0, 2.0): 2 * 4 + 3,  # the right edge belongs to the last cell
        (13.0, 24.0, 2.0): 3 * 4 + 1,  # and the lower one
        (18.0, 24.0, 2.0): 15,
        (18.1, 22.0, 2.0): None,
        (9.9, 22.0, 2.0): None,
        (13.0, 24.1, 2.0): None,
        (13.0, 22.0, 0.0): None,
    }
    index, valid = heatmap_targets(torch.tensor([list(cases)]), box, side=4)
    assert index[0].tolist() == [cell or 0 for cell in cases.values()]
    assert valid[0].tolist() == [cell is not None for cell in cases.values()]
    assert (index.dtype, valid.dtype) == (torch.int64, torch.bool)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from([4, 7, 56]))
def test_agrees_with_torchvision(seed: int, side: int) -> None:
    keypoints, boxes = random_case(seed)
    index, valid = heatmap_targets(keypoints, boxes, side=side)
    their_index, their_valid = keypoints_to_heatmap(keypoints, boxes, side)
    assert torch.equal(index, their_index)
    assert torch.equal(valid, their_valid.bool())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_agrees_with_the_loop(seed: int) -> None:
    keypoints, boxes = random_case(seed)
    index, valid = heatmap_targets(keypoints, boxes, side=8)  # as the sides, a power of two: nothing is rounded
    for region, box in enumerate(boxes.tolist()):
        expected = [reference.cell(keypoint, box, 8) for keypoint in keypoints[region].tolist()]
        assert [
            cell if there else None for cell, there in zip(index[region].tolist(), valid[region].tolist(), strict=True)
        ] == expected


def test_a_box_that_is_not_one_has_no_keypoints() -> None:
    keypoints = torch.tensor([[[3.0, 3.0, 2.0]]] * 3)
    boxes = torch.tensor([[1.0, 1, 1, 5], [float("nan"), 1, 5, 5], [1, 1, float("inf"), 5]])
    index, valid = heatmap_targets(keypoints, boxes, side=8)
    assert index[:2].tolist() == [[0], [0]]
    assert valid[:2].tolist() == [[False], [False]]
    assert 0 <= int(index[2, 0]) < 64


def test_half_precision_boxes_are_taken_up_to_float32() -> None:
    # 258 - 1 is 256 in bfloat16; 252 px into 257 is in cell 54.9, into 256 in cell 55.1.
    box = torch.tensor([[1.0, 1, 258, 258]])
    index, _ = heatmap_targets(torch.tensor([[[253.0, 2, 1]]]), box.bfloat16(), side=56)
    assert index.tolist() == [[54]]


def test_no_regions() -> None:
    index, valid = heatmap_targets(torch.zeros(0, 17, 3), torch.zeros(0, 4), side=56)
    assert index.shape == valid.shape == (0, 17)

"""Matching against a loop, against torchvision's Matcher, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from model import matcher
from model.matcher import Matches, ignore_crowd, match, take
from tests.reference import matcher as reference


def random_case(seed: int, *, num_images: int = 3, num_boxes: int = 40, num_places: int = 5) -> tuple[Tensor, ...]:
    """Boxes and ground truth on a coarse grid, so that many overlaps tie, and valid places of 0 to all."""
    random = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        corner = torch.randint(12, (*shape, 2), generator=random)
        return torch.cat([corner, corner + torch.randint(1, 9, (*shape, 2), generator=random)], dim=-1).float()

    num_valid = torch.randint(num_places + 1, (num_images, 1), generator=random)
    return boxes(num_images, num_boxes), boxes(num_images, num_places), torch.arange(num_places) < num_valid


def match_at(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, *, low_quality: bool, bounds: tuple[float, float]
) -> Matches:
    return match(
        boxes, gt_boxes, gt_valid, positive_iou=bounds[1], negative_iou=bounds[0], allow_low_quality=low_quality
    )


def by_torchvision(
    boxes: Tensor, gt_boxes: Tensor, low_quality: bool, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Index and label of the boxes of one image."""
    if len(gt_boxes) == 0:  # rpn.py and roi_heads.py make an image without ground truth all negative
        return torch.zeros(len(boxes), dtype=torch.int64), torch.zeros(len(boxes), dtype=torch.int8)
    found = Matcher(bounds[1], bounds[0], low_quality)(box_iou(gt_boxes, boxes))
    label = (found >= 0).to(torch.int8) - (found == Matcher.BETWEEN_THRESHOLDS).to(torch.int8)
    return found.clamp(min=0), label


def test_thresholds_by_hand() -> None:
    # Of a ground truth box of 10 × 10, boxes inside it that are 7, 6, 3 and 2 wide have IoU 0.7, 0.6, 0.3 and 0.2.
    gt_boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    boxes = torch.tensor([[0.0, 0, width, 10] for width in (7, 6, 3, 2)])
    valid = torch.tensor([[True]])
    found = match_at(boxes, gt_boxes, valid, low_quality=False, bounds=(0.3, 0.7))
    assert found.label.tolist() == [[1, -1, -1, 0]]  # both bounds belong to the upper side
    assert found.label.dtype == torch.int8
    assert found.gt_index.dtype == torch.int64


def test_the_best_of_a_ground_truth_box_is_positive_with_its_ties_but_keeps_its_own() -> None:
    # The small ground truth box (place 1) overlaps boxes 0 and 1 by 4 of 100 each and no other; box 0 is the large
    # one's (place 0) exactly, box 1 overlaps it by 50 of 150.
    gt_boxes = torch.tensor([[[0.0, 0, 10, 10], [6, 4, 8, 6]]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 40, 50, 50]])
    valid = torch.tensor([[True, True]])
    strict = match_at(boxes, gt_boxes, valid, low_quality=False, bounds=(0.3, 0.7))
    assert strict.label.tolist() == [[1, -1, 0]]
    found = match_at(boxes, gt_boxes, valid, low_quality=True, bounds=(0.3, 0.7))
    assert found.label.tolist() == [[1, 1, 0]]
    assert found.gt_index.tolist() == [[0, 0, 0]]  # not 1, through which box 1 became positive


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_the_first_of_equal_ground_truth_boxes_is_matched(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "_CHUNK_PAIRS", {"cpu": chunk})
    twins = torch.tensor([[[5.0, 5, 9, 9], [0, 0, 4, 4], [0, 0, 4, 4]]])
    boxes = torch.tensor([[0.0, 0, 4, 4]])
    found = match_at(boxes, twins, torch.ones(1, 3, dtype=torch.bool), low_quality=False, bounds=(0.5, 0.5))
    assert found.gt_index.tolist() == [[1]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([(0.3, 0.7), (0.5, 0.5), (0.0, 0.25)]))
def test_agrees_with_torchvision_and_with_the_loop(seed: int, low_quality: bool, bounds: tuple[float, float]) -> None:
    boxes, gt_boxes, valid = random_case(seed)
    found = match_at(boxes, gt_boxes, valid, low_quality=low_quality, bounds=bounds)
    for image in range(len(boxes)):
        there = gt_boxes[image][valid[image]]
        gt_index, label = by_torchvision(boxes[image], there, low_quality, bounds)
        assert torch.equal(found.gt_index[image], gt_index)
        assert torch.equal(found.label[image], label)
        # In double too: coordinates are small integers, so overlaps tie in both, and no bound lies between them.
        expected = reference.match(
            boxes[image].tolist(),
            there.tolist(),
            negative_iou=bounds[0],
            positive_iou=bounds[1],
            allow_low_quality=low_quality,
        )
        if bounds != (0.3, 0.7):  # 3/10 lies above the double 0.3 in float32 and at it in double
            assert (found.gt_index[image].tolist(), found.label[image].tolist()) == expected


@pytest.mark.parametrize("low_quality", [False, True])
def test_no_part_of_the_batch_changes_another(low_quality: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, gt_boxes, valid = random_case(1, num_images=7)
    whole = match_at(boxes, gt_boxes, valid, low_quality=low_quality, bounds=(0.3, 0.7))
    whole_crowd = ignore_crowd(whole.label, boxes, gt_boxes, valid, threshold=0.5)
    for chunk in (1, 2 * 40, 2 * 5 * 40):  # a pair of image and place at a time, two places, two images
        monkeypatch.setattr(matcher, "_CHUNK_PAIRS", {"cpu": chunk})
        parts = match_at(boxes, gt_boxes, valid, low_quality=low_quality, bounds=(0.3, 0.7))
        assert torch.equal(parts.gt_index, whole.gt_index)
        assert torch.equal(parts.label, whole.label)
        assert torch.equal(ignore_crowd(whole.label, boxes, gt_boxes, valid, threshold=0.5), whole_crowd)


def test_what_lies_in_an_empty_place_does_not_matter() -> None:
    boxes, gt_boxes, valid = random_case(2)
    other = gt_boxes.where(valid[..., None], boxes[:, :5])
    first = match_at(boxes, gt_boxes, valid, low_quality=True, bounds=(0.3, 0.7))
    second = match_at(boxes, other, valid, low_quality=True, bounds=(0.3, 0.7))
    assert torch.equal(first.gt_index, second.gt_index)
    assert torch.equal(first.label, second.label)


def test_boxes_may_be_shared_by_the_images() -> None:
    boxes, gt_boxes, valid = random_case(3)
    shared = match_at(boxes[0], gt_boxes, valid, low_quality=True, bounds=(0.3, 0.7))
    each = match_at(boxes[:1].repeat(3, 1, 1), gt_boxes, valid, low_quality=True, bounds=(0.3, 0.7))
    assert torch.equal(shared.label, each.label)
    assert torch.equal(shared.gt_index, each.gt_index)


def test_a_ground_truth_box_without_area_wins_nothing() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [3, 3, 3, 3]])
    found = match_at(
        boxes, torch.tensor([[[3.0, 3, 3, 3]]]), torch.tensor([[True]]), low_quality=True, bounds=(0.3, 0.7)
    )
    assert found.label.tolist() == [[0, 0]]


def test_nothing_to_match() -> None:
    boxes, gt_boxes, valid = random_case(4)
    without_places = match_at(boxes, gt_boxes[:, :0], valid[:, :0], low_quality=True, bounds=(0.3, 0.7))
    without_valid = match_at(boxes, gt_boxes, torch.zeros_like(valid), low_quality=True, bounds=(0.0, 0.7))
    for found in (without_places, without_valid):
        assert found.label.shape == (3, 40)
        assert not found.label.any()
        assert not found.gt_index.any()
    assert match_at(boxes[:, :0], gt_boxes, valid, low_quality=True, bounds=(0.3, 0.7)).label.shape == (3, 0)
    assert match_at(boxes[:0], gt_boxes[:0], valid[:0], low_quality=True, bounds=(0.3, 0.7)).label.shape == (0, 40)
    assert ignore_crowd(without_places.label, boxes, gt_boxes[:, :0], valid[:, :0], threshold=0.5).shape == (3, 40)


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most positive_iou 0\.3, got 0\.7"):
        match_at(*random_case(5), low_quality=True, bounds=(0.7, 0.3))


def test_a_crowd_takes_negatives_by_their_own_area() -> None:
    # A box of 10 × 10 of which 7 rows lie in a crowd a hundred times as large: IoU below 0.01, own share 0.7.
    boxes = torch.tensor([[[0.0, -3, 10, 7], [0, -4, 10, 6], [0, 0, 10, 10], [20, 20, 30, 30], [5, 5, 5, 5]]])
    crowd = torch.tensor([[[0.0, 0, 100, 100], [0, -50, 100, 50]]])
    label = torch.tensor([[0, 0, 1, -1, 0]], dtype=torch.int8)
    one = torch.tensor([[True, False]])
    assert ignore_crowd(label, boxes, crowd, one, threshold=0.7).tolist() == [[-1, 0, 1, -1, 0]]
    assert ignore_crowd(label, boxes, crowd, one, threshold=0.6).tolist() == [[-1, -1, 1, -1, 0]]
    assert ignore_crowd(label, boxes, crowd, ~one, threshold=0.7).tolist() == [[-1, -1, 1, -1, 0]]
    assert ignore_crowd(label, boxes, crowd, one & ~one, threshold=0.7).tolist() == label.tolist()
    assert label.tolist() == [[0, 0, 1, -1, 0]]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0.25, 0.5, 1.0]))
def test_crowds_agree_with_the_loop(seed: int, threshold: float) -> None:
    boxes, crowd, valid = random_case(seed)
    label = torch.randint(-1, 2, boxes.shape[:2], generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    found = ignore_crowd(label, boxes, crowd, valid, threshold=threshold)
    for image in range(len(boxes)):
        expected = reference.ignore_crowd(
            label[image].tolist(), boxes[image].tolist(), crowd[image][valid[image]].tolist(), threshold
        )
        assert found[image].tolist() == expected


def test_take_gathers_within_each_image() -> None:
    values = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]])
    index = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert take(values, index).tolist() == [[[3, 4], [3, 4], [1, 2]], [[5, 6], [7, 8], [5, 6]]]
    assert take(values[..., 0], index).tolist() == [[3, 3, 1], [5, 7, 5]]
    assert take(values[:, :0], index).tolist() == [[[0, 0]] * 3] * 2


def test_half_precision_boxes_are_compared_in_float32() -> None:
    # In bfloat16, whose spacing at 256 is 2, products and sums of these sides would be off by whole pixels.
    boxes = torch.tensor([[[0.0, 0, 254, 254], [0, 0, 254, 250]]])
    half = match_at(
        boxes.bfloat16(), boxes[:, :1].bfloat16(), torch.tensor([[True]]), low_quality=False, bounds=(0.5, 0.984)
    )
    assert half.label.tolist() == [[1, 1]]  # 250/254 = 0.98425

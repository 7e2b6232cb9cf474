"""Segment NMS against a loop, against torchvision, and by hand."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms, nms

import model.nms
from model.nms import segment_nms
from tests.reference import nms as reference

FAR = 1e4


def random_case(seed: int, num_boxes: int, num_segments: int, *, whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes around a few centres, scores with ties, segments; ``whole`` keeps coordinates on the pixel grid."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.rand(max(1, num_boxes // 5), 2, generator=random) * 300
    corner = centres[torch.randint(len(centres), (num_boxes,), generator=random)]
    corner = corner + torch.randn(num_boxes, 2, generator=random) * 6
    extent = torch.rand(num_boxes, 2, generator=random) * 60
    boxes = torch.cat([corner, corner + extent], dim=1)
    scores = torch.randint(1, 40, (num_boxes,), generator=random) / 40
    segments = torch.randint(num_segments, (num_boxes,), generator=random)
    return (boxes.round() if whole else boxes), scores, segments


def by_loop(boxes: Tensor, scores: Tensor, segments: Tensor, iou_threshold: float) -> list[int]:
    return reference.segment_nms(boxes.numpy(), scores.numpy(), segments.numpy(), iou_threshold)


def test_a_better_box_of_the_same_segment_suppresses() -> None:
    # The second overlaps the first by 90 of 110; the third is the second's twin in another segment.
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.95])
    segments = torch.tensor([3, 3, 5, 3])
    assert segment_nms(boxes, scores, segments, 0.5).tolist() == [3, 0, 2]
    assert segment_nms(boxes, scores, segments, 90 / 110).tolist() == [3, 0, 1, 2]


def test_a_suppressed_box_suppresses_nothing() -> None:
    # Each box overlaps the next by 2/3 and the one after by 1/3.
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [5, 0, 15, 10]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert segment_nms(boxes, scores, torch.zeros(3, dtype=torch.int64), 0.5).tolist() == [0, 2]


@pytest.mark.parametrize(("short_side", "kept"), [(5.0, [0, 1]), (1.0, [0])])
def test_the_threshold_is_compared_in_double(short_side: float, kept: list[int]) -> None:
    # IoU 5/10 is exact and not above 0.5; IoU 1/10 rounds up in float32 and so lies above the double 0.1.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, short_side]])
    scores = torch.tensor([0.9, 0.8])
    threshold = short_side / 10
    assert segment_nms(boxes, scores, torch.zeros(2, dtype=torch.int64), threshold).tolist() == kept
    assert nms(boxes, scores, threshold).tolist() == kept


@pytest.mark.parametrize("small_segment", [1, 8, 64])
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    num_boxes=st.integers(1, 70),
    num_segments=st.integers(1, 9),
    iou_threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    whole=st.booleans(),
)
def test_agrees_with_the_loop(
    small_segment: int, seed: int, num_boxes: int, num_segments: int, iou_threshold: float, whole: bool
) -> None:
    case = random_case(seed, num_boxes, num_segments, whole=whole)
    with mock.patch.object(model.nms, "_SMALL_SEGMENT", small_segment):
        assert segment_nms(*case, iou_threshold).tolist() == by_loop(*case, iou_threshold)


@pytest.mark.parametrize(("num_boxes", "num_segments"), [(4_000, 300), (4_000, 5), (2_500, 40)])
def test_agrees_with_torchvision(num_boxes: int, num_segments: int) -> None:
    boxes, scores, segments = random_case(0, num_boxes, num_segments)
    scores = torch.randperm(num_boxes) / num_boxes  # torchvision promises nothing about ties
    kept = segment_nms(boxes, scores, segments, 0.5)
    assert kept.tolist() == batched_nms(boxes, scores, segments, 0.5).tolist()
    for segment in range(num_segments):
        own = torch.nonzero(segments == segment)[:, 0]
        assert kept[segments[kept] == segment].tolist() == own[nms(boxes[own], scores[own], 0.5)].tolist()


def test_coordinates_are_not_rounded_by_a_shift_between_segments() -> None:
    # IoU is 0.5 exactly, which is kept; a shift of 10⁷ times the extent would leave no fraction of a pixel.
    boxes = torch.tensor([[0.0, 0, 0.5, 0.25], [0, 0, 0.25, 0.25], [FAR, FAR, FAR + 1, FAR + 1]]).repeat(2, 1)
    segments = torch.tensor([0, 0, 0, 10**7, 10**7, 10**7])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert segment_nms(boxes, scores, segments, 0.5).tolist() == [0, 1, 2, 3, 4, 5]
    assert segment_nms(boxes, scores, segments, 0.49).tolist() == [0, 2, 3, 5]


def test_equal_scores_are_taken_by_lower_index() -> None:
    num_boxes = 200
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(num_boxes, 1)
    segments = torch.arange(num_boxes) % 50
    segments[100:] = 50  # one long segment as well
    kept = segment_nms(boxes, torch.full((num_boxes,), 0.5), segments, 0.5)
    assert kept.tolist() == [*range(50), 100]


@pytest.mark.parametrize("num_segments", [2, 60])
def test_the_order_of_the_boxes_does_not_matter(num_segments: int) -> None:
    boxes, _, segments = random_case(1, 500, num_segments)
    scores = torch.randperm(500, generator=torch.Generator().manual_seed(2)) / 500
    shuffle = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    kept = segment_nms(boxes[shuffle], scores[shuffle], segments[shuffle], 0.5)
    assert shuffle[kept].tolist() == segment_nms(boxes, scores, segments, 0.5).tolist()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), shift=st.integers(-1000, 1000))
def test_shifting_a_segment_by_whole_pixels_changes_nothing(seed: int, shift: int) -> None:
    boxes, scores, segments = random_case(seed, 120, 3, whole=True)
    shifted = boxes + shift * (segments == 1)[:, None]
    assert segment_nms(shifted, scores, segments, 0.5).tolist() == segment_nms(boxes, scores, segments, 0.5).tolist()


def test_what_is_kept_is_kept_again() -> None:
    boxes, scores, segments = random_case(4, 900, 30)
    kept = segment_nms(boxes, scores, segments, 0.4)
    again = segment_nms(boxes[kept], scores[kept], segments[kept], 0.4)
    assert again.tolist() == list(range(len(kept)))


def test_empty_boxes_suppress_nothing() -> None:
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10]])
    kept = segment_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64), 0.0)
    assert kept.tolist() == [0, 1, 2]
    assert np.isnan(reference.iou(boxes[0].numpy(), boxes[1].numpy()))


@pytest.mark.parametrize("num_boxes", [0, 1])
def test_few_boxes_are_all_kept(num_boxes: int) -> None:
    kept = segment_nms(
        torch.zeros(num_boxes, 4), torch.zeros(num_boxes), torch.zeros(num_boxes, dtype=torch.int64), 0.5
    )
    assert kept.dtype == torch.int64
    assert kept.tolist() == list(range(num_boxes))


@pytest.mark.gpu
def test_cuda_agrees_with_cpu() -> None:
    boxes, scores, segments = random_case(5, 3_000, 70)
    on_cuda = segment_nms(boxes.cuda(), scores.cuda(), segments.cuda(), 0.5)
    assert on_cuda.tolist() == segment_nms(boxes, scores, segments, 0.5).tolist()

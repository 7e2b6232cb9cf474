"""RLE of pasted masks against pycocotools on the full bitmap, against a loop, and by hand."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as pycocotools_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

import model.rle
from model import rle
from model.paste import PasteRule, paste_probabilities
from model.structures import ImageSize, Rle
from tests.reference import rle as reference

Mask = NDArray[np.bool_]

CERTAIN = 200.0
"""A logit whose probability is one in float32."""
RULES: list[PasteRule] = ["torchvision", "detectron2"]
NEAR = 1e-3
"""A pixel whose probability is this near the threshold may fall on either side of it."""


def random_logits(seed: int, num_masks: int, side: int, *, noisy: bool = False) -> Tensor:
    """Smooth blobs, as a mask head gives them, or noise with a crossing at nearly every cell."""
    random = torch.Generator().manual_seed(seed)
    if noisy:
        return torch.randn(num_masks, side, side, generator=random) * 4
    coarse = torch.randn(num_masks, 1, 5, 5, generator=random) * 4
    return F.interpolate(coarse, size=(side, side), mode="bicubic")[:, 0]


def random_boxes(seed: int, num_boxes: int, size: ImageSize) -> Tensor:
    """Boxes of all sizes about the image, many across its edges, some outside, some without extent."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.tensor([size.width, size.height])
    corner = (torch.rand(num_boxes, 2, generator=random) * 1.6 - 0.5) * scale
    extent = torch.rand(num_boxes, 2, generator=random) ** 2 * 1.3 * scale
    extent[::6, 1] = 0
    return torch.cat([corner, corner + extent], dim=1)


def by_pycocotools(mask: Mask) -> bytes:
    counts: bytes = pycocotools_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return counts


def assert_follows(encoded: Rle, area: int, probability: NDArray[np.float32], threshold: float = 0.5) -> None:
    """The mask is the thresholded picture but for pixels near the threshold, and its string is pycocotools'."""
    mask = rle.decode(encoded)
    differs = mask != (probability >= threshold)
    assert np.abs(probability[differs] - threshold).max(initial=0) < NEAR
    assert encoded["size"] == list(probability.shape)
    assert encoded["counts"] == by_pycocotools(mask)
    assert area == mask.sum() == rle.area(encoded)


def test_a_square_by_hand() -> None:
    # Two cells on two pixels: pixel centres are cell centres, so pixels 1 and 2 are certain and 0 and 3 have none.
    encoded, areas = rle.encode_detections(
        torch.full((1, 2, 2), CERTAIN), torch.tensor([[1.0, 1, 3, 3]]), ImageSize(4, 5), paste="detectron2"
    )
    # Down the columns of four: one column and a pixel, two set, two not, two set, and what is left of twenty. The
    # fourth run is written as its difference from the second, 2 − 2, the fifth from the third, 9 − 2.
    runs = [4 + 1, 2, 2, 2, 20 - 11]
    assert reference.runs(rle.decode(encoded[0])) == runs
    assert encoded == [{"size": [4, 5], "counts": bytes(48 + code for code in [5, 2, 2, 2 - 2, 9 - 2])}]
    assert areas.tolist() == [4]


def test_a_pixel_at_the_threshold_is_set() -> None:
    # The same four pixel centres on cell centres, each cell now at a probability of exactly one half.
    _, areas = rle.encode_detections(
        torch.zeros(1, 2, 2), torch.tensor([[1.0, 1, 3, 3]]), ImageSize(4, 5), paste="detectron2"
    )
    assert areas.tolist() == [4]


@pytest.mark.parametrize("paste", RULES)
@pytest.mark.parametrize("noisy", [False, True])
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    side=st.sampled_from([1, 2, 14, 28]),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    threshold=st.sampled_from([0.5, 0.2, 0.9]),
)
def test_encodes_the_thresholded_paste(
    paste: PasteRule, noisy: bool, seed: int, side: int, height: int, width: int, threshold: float
) -> None:
    size = ImageSize(height, width)
    logits, boxes = random_logits(seed, 4, side, noisy=noisy), random_boxes(seed, 4, size)
    encoded, areas = rle.encode_detections(logits, boxes, size, threshold=threshold, paste=paste)
    pieces = paste_probabilities(logits, boxes, size, paste=paste)
    for one, area, (piece, (top, left)) in zip(encoded, areas.tolist(), pieces, strict=True):
        probability = np.zeros(size, np.float32)
        probability[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
        assert_follows(one, area, probability, threshold)


@pytest.mark.parametrize("size", [ImageSize(480, 640), ImageSize(97, 133), ImageSize(9, 7), ImageSize(1, 1)])
def test_agrees_with_torchvision_and_pycocotools(size: ImageSize) -> None:
    logits, boxes = random_logits(0, 40, 28), random_boxes(0, 40, size)
    boxes[:, 0::2].clamp_(0, size.width)  # torchvision cannot paste a box that lies outside
    boxes[:, 1::2].clamp_(0, size.height)
    encoded, areas = rle.encode_detections(logits, boxes, size)
    pasted = paste_masks_in_image(logits.sigmoid()[:, None], boxes, tuple(size))[:, 0].numpy()
    for one, area, probability in zip(encoded, areas.tolist(), pasted, strict=True):
        assert_follows(one, area, probability)
    same = sum(one["counts"] == by_pycocotools(mask) for one, mask in zip(encoded, pasted >= 0.5, strict=True))
    assert same >= 38  # a pixel within rounding of the threshold is rare


@pytest.mark.parametrize("paste", RULES)
def test_a_box_over_the_whole_image_sets_every_pixel(paste: PasteRule) -> None:
    size = ImageSize(30, 40)
    boxes = torch.tensor([[-9.0, -9, 49, 39], [-4, -4, 44, 34], [-1e5, -1e5, 1e5, 1e5]])
    encoded, areas = rle.encode_detections(torch.full((3, 28, 28), CERTAIN), boxes, size, paste=paste)
    # No zeros, then one run across all columns.
    assert [one["counts"] for one in encoded] == [reference.to_string([0, 30 * 40])] * 3
    assert areas.tolist() == [30 * 40] * 3


@pytest.mark.parametrize("paste", RULES)
@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ([-8.0, -8, 4, 4], (0, 4), (0, 4)),  # the first pixel
        ([30.0, 20, 60, 50], (20, 30), (30, 40)),  # the last pixel
        ([10.0, -8, 14, 50], (0, 30), (10, 14)),  # top and bottom: runs cross columns
        ([-8.0, 10, 60, 14], (10, 14), (0, 40)),  # left and right
        ([-8.0, -8, 60, 4], (0, 4), (0, 40)),  # all along the top
        ([-8.0, 20, 60, 60], (20, 30), (0, 40)),  # all along the bottom
    ],
)
def test_masks_that_touch_an_edge(
    paste: PasteRule, box: list[float], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    size = ImageSize(30, 40)
    (encoded,), (area,) = rle.encode_detections(
        torch.full((1, 28, 28), CERTAIN), torch.tensor([box]), size, paste=paste
    )
    mask = rle.decode(encoded)
    assert encoded["counts"] == reference.encode(mask) == by_pycocotools(mask)
    # torchvision's rule counts the last pixel in, so a mask may be one pixel wider.
    expected = np.zeros(size, bool)
    expected[slice(*rows), slice(*columns)] = True
    slack = np.zeros(size, bool)
    slack[max(rows[0] - 1, 0) : rows[1] + 1, max(columns[0] - 1, 0) : columns[1] + 1] = True
    assert mask[expected].all()
    assert not mask[~slack].any()
    assert area == mask.sum()


@pytest.mark.parametrize("paste", RULES)
@pytest.mark.parametrize(
    "box",
    [[-50.0, 2, -20, 8], [200.0, 2, 230, 8], [2.0, 200, 8, 230], [math.nan, 2, 8, 8], [0.0, 0, math.inf, 9]],
)
def test_a_box_outside_gives_an_empty_mask(paste: PasteRule, box: list[float]) -> None:
    logits = torch.full((3, 28, 28), CERTAIN)
    boxes = torch.tensor([[2.0, 2, 8, 8], box, [2.0, 2, 8, 8]])
    encoded, areas = rle.encode_detections(logits, boxes, ImageSize(20, 30), paste=paste)
    assert encoded[1]["counts"] == reference.to_string([20 * 30])
    assert areas[1] == 0
    assert encoded[0] == encoded[2]
    assert areas[0] == areas[2] > 0


def test_a_logit_that_is_not_a_number_is_not_set() -> None:
    logits, boxes, size = random_logits(1, 1, 14), torch.tensor([[2.0, 2, 50, 60]]), ImageSize(70, 60)
    logits[0, 5] = math.nan
    encoded, _ = rle.encode_detections(logits, boxes, size)
    assert encoded == rle.encode_detections(logits.nan_to_num(-CERTAIN), boxes, size)[0]


def test_detections_do_not_affect_each_other() -> None:
    size = ImageSize(60, 80)
    logits, boxes = random_logits(2, 30, 28), random_boxes(2, 30, size)
    encoded, areas = rle.encode_detections(logits, boxes, size)
    order = np.random.default_rng(3).permutation(30)
    shuffled, shuffled_areas = rle.encode_detections(logits[order], boxes[order], size)
    assert shuffled == [encoded[index] for index in order]
    assert shuffled_areas.tolist() == areas[order].tolist()
    assert rle.encode_detections(logits[4:5], boxes[4:5], size)[0] == encoded[4:5]


@pytest.mark.parametrize("paste", RULES)
def test_chunks_leave_no_seam(paste: PasteRule) -> None:
    size = ImageSize(40, 50)
    logits, boxes = random_logits(4, 9, 28), random_boxes(4, 9, size)
    logits[:3], boxes[:3] = CERTAIN, torch.tensor([-9.0, -9, 60, 60])  # runs across every column
    encoded, areas = rle.encode_detections(logits, boxes, size, paste=paste)
    with mock.patch.object(model.rle, "_CHUNK_COLUMNS", 7):
        again, again_areas = rle.encode_detections(logits, boxes, size, paste=paste)
    assert again == encoded
    assert again_areas.tolist() == areas.tolist()


@pytest.mark.parametrize("paste", RULES)
def test_a_shift_of_the_box_by_whole_pixels_shifts_the_mask(paste: PasteRule) -> None:
    # Edges on quarters and a shift by a power of two: no position rounds differently.
    size = ImageSize(128, 160)
    logits, boxes = random_logits(5, 2, 28), torch.tensor([[10.25, 12.5, 70.75, 50], [8, 8, 100, 90]])
    before, _ = rle.encode_detections(logits, boxes, size, paste=paste)
    after, _ = rle.encode_detections(logits, boxes + 16, size, paste=paste)
    for one, moved in zip(before, after, strict=True):
        assert np.array_equal(np.roll(rle.decode(one), (16, 16), axis=(0, 1)), rle.decode(moved))


def test_no_detections_give_no_masks() -> None:
    encoded, areas = rle.encode_detections(torch.zeros(0, 28, 28), torch.zeros(0, 4), ImageSize(5, 6))
    assert encoded == []
    assert areas.shape == (0,)
    assert areas.dtype == np.int64


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, math.nan])
def test_a_threshold_lies_above_0_and_at_most_at_1(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be above 0"):
        rle.encode_detections(torch.zeros(0, 28, 28), torch.zeros(0, 4), ImageSize(5, 6), threshold=threshold)


@settings(deadline=None, max_examples=80)
@given(lists=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12), max_size=4))
def test_strings_agree_with_the_loop(lists: list[list[int]]) -> None:
    first_run = np.cumsum([0, *map(len, lists)])
    flat = np.array([count for counts in lists for count in counts], np.int64)
    assert rle._to_strings(flat, first_run) == [reference.to_string(counts) for counts in lists]


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**31), height=st.integers(1, 40), width=st.integers(1, 40), share=st.floats(0, 1))
def test_decode_inverts_encode(seed: int, height: int, width: int, share: float) -> None:
    random = np.random.default_rng(seed)
    mask = np.repeat(random.random((height, width)) < share, random.integers(1, 9), axis=0)
    encoded = Rle(size=list(mask.shape), counts=by_pycocotools(mask))
    assert encoded["counts"] == reference.encode(mask)
    assert np.array_equal(rle.decode(encoded), mask)
    assert rle.area(encoded) == mask.sum()


@pytest.mark.parametrize("counts", [b"", b"5", b"51:1", b"o", b"\x1f1:", b"5\xff:", b"6N8"])
def test_a_string_that_is_not_a_mask_of_that_size_is_refused(counts: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a COCO run-length string|runs must be positive and fill 4 x 4"):
        rle.decode(Rle(size=[4, 4], counts=counts))


@pytest.mark.gpu
def test_cuda_logits_are_encoded_too() -> None:
    size = ImageSize(60, 80)
    logits, boxes = random_logits(6, 10, 28), random_boxes(6, 10, size)
    pieces = paste_probabilities(logits, boxes, size)
    encoded, areas = rle.encode_detections(logits.cuda(), boxes.cuda(), size)
    for one, area, (piece, (top, left)) in zip(encoded, areas.tolist(), pieces, strict=True):
        probability = np.zeros(size, np.float32)
        probability[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
        assert_follows(one, area, probability)

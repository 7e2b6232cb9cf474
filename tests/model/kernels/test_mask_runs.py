"""Masks of a batch encoded by the kernels: against model/rle.py to the last bit, against the slow loop, and by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as pycocotools_mask
from torch import Tensor

from model import rle
from model.kernels.mask_outline import COLUMNS
from model.kernels.mask_runs import encode_masks
from model.paste import PasteRule, paste_probabilities
from model.raw_detections import MaskTexts, strings_of
from model.structures import ImageSize, Rle
from tests.model.test_rle import CERTAIN, RULES, assert_follows, random_boxes, random_logits
from tests.reference import rle as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOM: dict[str, Any] = {"run_capacity": 200_000, "text_capacity": 500_000}


def encode(
    logits: Tensor,
    boxes: Tensor,
    sizes: list[ImageSize],
    valid: Tensor | None = None,
    *,
    threshold: float = 0.5,
    paste: PasteRule = "torchvision",
    **capacities: int,
) -> MaskTexts:
    """What encode_masks gives, copied to the host."""
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool) if valid is None else valid
    inputs = (tensor.to(DEVICE) for tensor in (logits, boxes, torch.tensor(sizes).reshape(-1, 2), valid))
    encoded = encode_masks(*inputs, threshold=threshold, paste=paste, **(ROOM | capacities))
    return MaskTexts(*(tensor.cpu() for tensor in encoded))


def masks_of(encoded: MaskTexts, sizes: list[ImageSize], kept: NDArray[np.bool_] | None = None) -> list[list[Rle]]:
    per_image = len(encoded.ends) // len(sizes)
    kept = np.ones((len(sizes), per_image), bool) if kept is None else kept
    strings = strings_of(encoded)
    return [
        [Rle(size=list(size), counts=strings[image * per_image + place]) for place in np.flatnonzero(kept[image])]
        for image, size in enumerate(sizes)
    ]


@contextmanager
def guarded_buffers() -> Iterator[list[Tensor]]:
    """Within this, torch.empty gives the front of a longer buffer; the list has what lies behind each."""
    guards: list[Tensor] = []

    def empty(length: int, **kind: Any) -> Tensor:
        longer = torch.full((length + 512,), 77, **kind)
        guards.append(longer[length:])
        return longer[:length]

    with mock.patch.object(torch, "empty", empty):
        yield guards


def assert_follow(masks: list[Rle], areas: Tensor, logits: Tensor, boxes: Tensor, paste: PasteRule) -> None:
    """The masks of one image are its thresholded pictures."""
    size = ImageSize(*masks[0]["size"])
    pieces = paste_probabilities(logits, boxes, size, paste=paste)
    for one, area, (piece, (top, left)) in zip(masks, areas.tolist(), pieces, strict=True):
        probability = np.zeros(size, np.float32)
        probability[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
        assert_follows(one, area, probability)
        assert np.array_equal(pycocotools_mask.decode(one), rle.decode(one))


def random_batch(seed: int, sizes: list[ImageSize], per_image: int, side: int, noisy: bool) -> tuple[Tensor, Tensor]:
    """Logits (N, D, M, M) and boxes (N, D, 4)."""
    seeds = [seed + index for index in range(len(sizes))]
    logits = [random_logits(each, per_image, side, noisy=noisy) for each in seeds]
    return torch.stack(logits), torch.stack(
        # The first of random_boxes has no height.
        [random_boxes(each, per_image + 1, size)[1:] for each, size in zip(seeds, sizes, strict=True)]
    )


def test_a_square_by_hand() -> None:
    # Two cells on two pixels: pixel centres are cell centres, so pixels 1 and 2 are certain and 0 and 3 have none.
    sizes = [ImageSize(4, 5)]
    encoded = encode(torch.full((1, 1, 2, 2), CERTAIN), torch.tensor([[[1.0, 1, 3, 3]]]), sizes, paste="detectron2")
    # Down the columns of four: one column and a pixel, two set, two not, two set, and what is left of twenty. The
    # fourth run is written as its difference from the second, 2 − 2, the fifth from the third, 9 − 2.
    assert masks_of(encoded, sizes) == [[{"size": [4, 5], "counts": bytes(48 + code for code in [5, 2, 2, 0, 7])}]]
    assert encoded.areas.tolist() == [4]
    assert encoded.ends.tolist() == [5]
    assert encoded.needed.tolist() == [5, 5]


@pytest.mark.parametrize("paste", RULES)
@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    side=st.sampled_from([1, 2, 7]),
    noisy=st.booleans(),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_encodes_the_thresholded_paste(
    paste: PasteRule, seed: int, side: int, noisy: bool, height: int, width: int
) -> None:
    sizes = [ImageSize(height, width), ImageSize(width, height)]
    logits, boxes = random_batch(seed, sizes, 2, side, noisy)
    encoded = encode(logits, boxes, sizes, paste=paste)
    for index, masks in enumerate(masks_of(encoded, sizes)):
        assert_follow(masks, encoded.areas.reshape(2, 2)[index], logits[index], boxes[index], paste)


@pytest.mark.parametrize("paste", RULES)
def test_a_real_mask_side_agrees(paste: PasteRule) -> None:
    sizes = [ImageSize(50, 90)]
    logits, boxes = random_batch(3, sizes, 2, 28, noisy=False)
    boxes[0] = torch.tensor([[-5.5, 4, 88, 47], [12.25, -3, 60, 70]])
    encoded = encode(logits, boxes, sizes, paste=paste)
    assert_follow(masks_of(encoded, sizes)[0], encoded.areas, logits[0], boxes[0], paste)


BOXES = [
    [-9.0, -9, 49, 39],  # the whole image and more
    [-1e5, -1e5, 1e5, 1e5],
    [-8.0, -8, 4, 4],  # the first pixel
    [30.0, 20, 60, 50],  # the last pixel
    [10.0, -8, 14, 50],  # top and bottom: runs cross columns
    [-8.0, 10, 60, 14],  # left and right
    [-8.0, -8, 60, 4],
    [-8.0, 20, 60, 60],
    [7.0, 8, 8, 9],  # one pixel
    [7.2, 8.3, 7.6, 8.4],  # less than one
    [7.0, 8, 7, 8],
    [9.0, 8, 7, 5],  # turned around
    [5.0, 5, 5 + 2**-20, 20],  # scarcely wide
    [-50.0, 2, -20, 8],  # outside
    [200.0, 2, 230, 8],
    [2.0, 200, 8, 230],
    [math.nan, 2, 8, 8],
    [0.0, 0, math.inf, 9],
    [-math.inf, 0, 8, 9],
]


@pytest.mark.parametrize("paste", RULES)
@pytest.mark.parametrize("pattern", [[[1, 1], [1, 1]], [[1, 0], [0, 1]], [[0, 0], [0, 0]]])
def test_boxes_of_every_kind_agree_with_the_cpu(paste: PasteRule, pattern: list[list[int]]) -> None:
    size = ImageSize(30, 40)
    logits = (2 * torch.tensor(pattern) - 1).expand(len(BOXES), 2, 2) * CERTAIN  # certain either way: no sigmoid rounds
    expected, areas = rle.encode_detections(logits, torch.tensor(BOXES), size, paste=paste)
    encoded = encode(logits[None], torch.tensor([BOXES]), [size], paste=paste)
    assert masks_of(encoded, [size]) == [expected]
    assert encoded.areas.tolist() == areas.tolist()
    if pattern == [[1, 1], [1, 1]]:
        assert [one["counts"] for one in expected[:2]] == [reference.to_string([0, 30 * 40])] * 2


@pytest.mark.parametrize("paste", RULES)
def test_a_gap_of_less_than_a_pixel_leaves_no_border(paste: PasteRule) -> None:
    size, boxes = ImageSize(12, 9), torch.tensor([[0.0, 1, 9, 11], [1.5, -2.5, 7, 13], [2, 3.25, 9, 8.75]])
    logits = torch.full((3, 14, 14), CERTAIN)
    logits[:, 1::2] = -CERTAIN
    expected, areas = rle.encode_detections(logits, boxes, size, paste=paste)
    encoded = encode(logits[None], boxes[None], [size], paste=paste)
    assert masks_of(encoded, [size]) == [expected]
    assert encoded.areas.tolist() == areas.tolist()


@pytest.mark.parametrize("paste", RULES)
def test_blocks_of_columns_leave_no_seam(paste: PasteRule) -> None:
    size = ImageSize(6, 2 * COLUMNS + 5)
    # Full columns, that run on or end where a block of columns or the image does, and a chequered mask.
    right = [COLUMNS - 1.0, COLUMNS, COLUMNS + 1, 2 * COLUMNS, 2 * COLUMNS + 4, 2 * COLUMNS + 99]
    boxes = torch.tensor([[0, -50, x, 60] for x in right] + [[-3.0, 1, 2 * COLUMNS + 2, 9]])
    logits = torch.full((len(boxes), 4, 4), CERTAIN)
    logits[-1] *= torch.tensor([1, -1]).repeat(2)
    expected, _ = rle.encode_detections(logits, boxes, size, paste=paste)
    assert masks_of(encode(logits[None], boxes[None], [size], paste=paste), [size]) == [expected]


@pytest.mark.parametrize("paste", RULES)
def test_a_mask_may_end_where_a_block_of_columns_does(paste: PasteRule) -> None:
    # Cells of less than half a pixel, so that the last column a mask touches is set, down to the bottom of the image.
    size, side, first = ImageSize(3, COLUMNS + 20), 2 * COLUMNS + 12, 10
    logits, boxes = torch.full((1, side, side), CERTAIN), torch.tensor([[first + 0.55, -9, first + COLUMNS - 0.55, 9]])
    encoded = encode(logits[None], boxes[None], [size], threshold=0.2, paste=paste)
    whole_columns = [3 * first, 3 * COLUMNS, 3 * (size.width - first - COLUMNS)]
    assert masks_of(encoded, [size])[0][0]["counts"] == reference.to_string(whole_columns)
    assert masks_of(encoded, [size])[0] == rle.encode_detections(logits, boxes, size, threshold=0.2, paste=paste)[0]


def test_an_invalid_place_is_empty_and_changes_nothing_else() -> None:
    sizes = [ImageSize(20, 30), ImageSize(25, 15)]
    logits, boxes = random_batch(1, sizes, 3, 2, noisy=False)
    valid = torch.tensor([[True, False, True], [False, True, False]])
    boxes[0, 1] = math.nan
    encoded = encode(logits, boxes, sizes, valid)
    lengths = np.diff(encoded.ends.numpy(), prepend=0)
    assert (lengths[~valid.flatten().numpy()] == 0).all()
    assert (encoded.areas[~valid.flatten()] == 0).all()
    alone = [
        masks_of(encode(logits[i, None, valid[i]], boxes[i, None, valid[i]], [size]), [size])[0]
        for i, size in enumerate(sizes)
    ]
    assert masks_of(encoded, sizes, valid.numpy()) == alone
    first_only = np.array([[True, False, False], [False, False, False]])
    assert masks_of(encoded, sizes, first_only) == [alone[0][:1], []]


def test_a_logit_that_is_not_a_number_is_not_set() -> None:
    logits, boxes, sizes = random_logits(1, 1, 4)[None], torch.tensor([[[2.0, 2, 20, 30]]]), [ImageSize(33, 25)]
    logits[0, 0, 2] = math.nan
    assert torch.equal(encode(logits, boxes, sizes).areas, encode(logits.nan_to_num(-CERTAIN), boxes, sizes).areas)


def test_half_logits_and_sizes_of_any_kind_are_taken() -> None:
    sizes = [ImageSize(20, 30)]
    logits, boxes = random_batch(2, sizes, 2, 2, noisy=False)
    logits = logits.bfloat16()
    inputs = (boxes.to(DEVICE), torch.tensor(sizes, dtype=torch.float32, device=DEVICE))
    valid = torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    encoded = encode_masks(logits.to(DEVICE), *inputs, valid, threshold=0.5, paste="torchvision", **ROOM)
    expected = encode(logits.float(), boxes, sizes)
    assert torch.equal(encoded.ends.cpu(), expected.ends)
    num_bytes = int(expected.ends[-1])
    assert torch.equal(encoded.text[:num_bytes].cpu(), expected.text[:num_bytes])


@pytest.mark.parametrize("short", ["run_capacity", "text_capacity"])
def test_what_exceeds_a_capacity_is_dropped_and_told(short: str) -> None:
    sizes = [ImageSize(12, 14)]
    boxes = torch.tensor([[[2.0, 3, 8, 9], [1, 1, 12, 10], [4, 2, 9, 9]]])
    logits = torch.full((1, 3, 2, 2), CERTAIN)
    enough = encode(logits, boxes, sizes)
    needed = dict(zip(["run_capacity", "text_capacity"], enough.needed.tolist(), strict=True))
    for capacity in [0, 1, needed[short] // 2, needed[short] - 1, needed[short]]:
        with guarded_buffers() as guards:
            encoded = encode(logits, boxes, sizes, **(needed | {short: capacity}))
        assert len(guards) == 2
        assert all((guard == 77).all() for guard in guards)
        room = torch.tensor(list((needed | {short: capacity}).values()))
        assert (encoded.needed > room).any() == (capacity < needed[short])
        assert encoded.areas.tolist() == enough.areas.tolist()
        assert encoded.needed[0] == enough.needed[0]
        if short == "text_capacity":
            assert encoded.needed.tolist() == enough.needed.tolist()
            assert torch.equal(encoded.text, enough.text[:capacity])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_places_give_no_masks(shape: tuple[int, int]) -> None:
    sizes = [ImageSize(5, 6)] * shape[0]
    encoded = encode(torch.zeros(*shape, 2, 2), torch.zeros(*shape, 4), sizes)
    assert encoded.ends.shape == encoded.areas.shape == (0,)
    assert encoded.needed.tolist() == [0, 0]
    assert strings_of(encoded) == []


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, math.nan])
def test_a_threshold_lies_above_0_and_at_most_at_1(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be above 0"):
        encode(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4), [ImageSize(5, 6)], threshold=threshold)


def test_inputs_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"boxes must be float32 \(1, 2, 4\), got torch.float32 \(1, 1, 4\)"):
        encode(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 4), [ImageSize(5, 6)])
    with pytest.raises(ValueError, match=r"valid must be \(1, 2\) and image_sizes \(1, 2\), got"):
        encode(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4), [ImageSize(5, 6)] * 2)


@pytest.mark.gpu
def test_a_graph_holds_it_and_nothing_waits() -> None:
    sizes = [ImageSize(480, 640), ImageSize(300, 200)]
    logits, boxes = (tensor.cuda() for tensor in random_batch(5, sizes, 50, 28, noisy=False))
    inputs = (logits, boxes, torch.tensor(sizes).cuda(), torch.ones(2, 50, dtype=torch.bool).cuda())
    encode_masks(*inputs, threshold=0.5, paste="torchvision", **ROOM)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encoded = encode_masks(*inputs, threshold=0.5, paste="torchvision", **ROOM)
    fresh, fresh_boxes = random_batch(6, sizes, 50, 28, noisy=False)
    logits.copy_(fresh)
    boxes.copy_(fresh_boxes)
    graph.replay()
    for image, masks in enumerate(masks_of(MaskTexts(*(tensor.cpu() for tensor in encoded)), sizes)):
        areas = encoded.areas.cpu().reshape(2, 50)[image]
        assert_follow(masks, areas, fresh[image], fresh_boxes[image], "torchvision")

"""COCO run-length encoding of pasted masks, straight from the M × M logits.

In: mask logits and boxes in the image frame. Out: COCO's compressed strings, byte for byte those that
pycocotools.mask.encode gives for the thresholded full-size bitmaps, and areas. Format: cocoapi common/maskApi.c.

No bitmap is made. Down one column of pixels a pasted mask is piecewise linear between K knots, so it crosses the
threshold at most once between two knots, at a place that follows from their values. The cost is that of K values per
column, whatever the height of the image.
"""

# D detections, M mask side, K = M + 2 knots, Q columns of pixels over all masks, I intervals of set pixels,
# U runs over all masks.

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.paste import PasteAxis, PasteRule, pad_masks, paste_axes
from model.structures import ImageSize, Rle

Ints = NDArray[np.int64]

_CHUNK_COLUMNS = 8_192
"""Columns interpolated at once: about 1 MB of knots for a 28 × 28 mask."""


def encode_detections(
    mask_logits: Tensor, boxes: Tensor, size: ImageSize, *, threshold: float = 0.5, paste: PasteRule = "torchvision"
) -> tuple[list[Rle], Ints]:
    """RLEs of the pixels whose pasted probability is at least ``threshold``, and how many there are: areas (D,).

    ``mask_logits`` (D, M, M) are of the predicted class, ``boxes`` (D, 4) in the frame of an image of ``size``.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    padded = pad_masks(mask_logits)  # (D, K, K)
    y_axis, x_axis = paste_axes(boxes.detach().float().cpu().numpy(), mask_logits.shape[-1], size, paste)
    starts, stops = _intervals(padded, y_axis, x_axis, size, threshold)  # (I,) each
    num_pixels = size.height * size.width
    mask_index = starts // num_pixels
    areas = np.bincount(mask_index, stops - starts, minlength=len(padded)).astype(np.int64)  # (D,)
    counts, first_run = _runs(starts, stops, mask_index, len(padded), num_pixels)
    return [Rle(size=[size.height, size.width], counts=text) for text in _to_strings(counts, first_run)], areas


def decode(rle: Rle) -> NDArray[np.bool_]:
    """The mask (H, W) of an RLE."""
    height, width = rle["size"]
    counts = _from_string(rle["counts"])
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"runs must be positive and fill {height} x {width} pixels, got a sum of {counts.sum()}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T  # (H, W)


def area(rle: Rle) -> int:
    """How many pixels of an RLE are set."""
    return int(_from_string(rle["counts"])[1::2].sum())


def _intervals(
    padded: NDArray[np.float32], y_axis: PasteAxis, x_axis: PasteAxis, size: ImageSize, threshold: float
) -> tuple[Ints, Ints]:
    """Starts and stops of the runs of set pixels, counted down the columns of all D images laid end to end."""
    knots_by_column = np.ascontiguousarray(padded.transpose(0, 2, 1))  # (D, K, K): x, then y
    nothing = np.zeros(0, np.int64)
    all_starts, all_stops = [nothing], [nothing]
    for detection, x in _columns(y_axis, x_axis):
        values = _column_knots(knots_by_column, x_axis, detection, x)  # (Q, K)
        column, start, stop = _set_rows(values, y_axis, detection, threshold)
        top = (detection[column] * size.width + x[column]) * size.height
        all_starts.append(top + start)
        all_stops.append(top + stop)
    starts, stops = np.concatenate(all_starts), np.concatenate(all_stops)
    # A run that leaves a column at the bottom and enters the next at the top is one run, unless the image ends there.
    apart = (stops[:-1] != starts[1:]) | (starts[1:] % (size.height * size.width) == 0)
    begins, ends = np.ones((2, len(starts)), bool)
    begins[1:], ends[:-1] = apart, apart
    return starts[begins], stops[ends]


def _columns(y_axis: PasteAxis, x_axis: PasteAxis) -> Iterator[tuple[Ints, Ints]]:
    """Detection and x of every column of pixels that some mask may touch, in bounded chunks: (Q,) each."""
    widths = np.where(y_axis.stop > y_axis.start, x_axis.stop - x_axis.start, 0)
    ends = np.cumsum(widths)
    for begin in range(0, int(widths.sum()), _CHUNK_COLUMNS):
        column = np.arange(begin, min(begin + _CHUNK_COLUMNS, int(ends[-1])))
        detection = np.searchsorted(ends, column, side="right")
        yield detection, column - (ends - widths)[detection] + x_axis.start[detection]


def _column_knots(
    knots_by_column: NDArray[np.float32], x_axis: PasteAxis, detection: Ints, x: Ints
) -> NDArray[np.float32]:
    """Values (Q, K) at the knots down each column of pixels."""
    num_knots = knots_by_column.shape[1]
    table = knots_by_column.reshape(-1, num_knots)
    position = x_axis.knots(detection, x)
    left = position.astype(np.int64)
    fraction = (position - left).astype(np.float32)[:, None]
    # At or beyond the last knot, which is zero, the clipped indices find it.
    values: NDArray[np.float32] = np.take(table, detection * num_knots + np.minimum(left, num_knots - 1), axis=0)
    values *= 1 - fraction
    right = np.take(table, detection * num_knots + np.minimum(left + 1, num_knots - 1), axis=0)
    right *= fraction
    values += right
    return values


def _set_rows(
    values: NDArray[np.float32], y_axis: PasteAxis, detection: Ints, threshold: float
) -> tuple[Ints, Ints, Ints]:
    """Column and half-open range of rows of each interval of set pixels: (I,) each."""
    flat = values.ravel()
    is_set = flat >= threshold
    # The first and last knot of a column are zero, so crossings alternate: in, out, in, out.
    crossing = np.flatnonzero(is_set[1:] != is_set[:-1])
    column, knot = np.divmod(crossing, values.shape[1])
    before, after = flat[crossing].astype(np.float64), flat[crossing + 1].astype(np.float64)
    row = y_axis.pixels(detection[column], knot + (threshold - before) / (after - before))
    column = column[::2]
    low, high = y_axis.start[detection[column]], y_axis.stop[detection[column]]
    start = np.clip(np.ceil(row[::2]), low, high).astype(np.int64)
    stop = np.clip(np.floor(row[1::2]) + 1, low, high).astype(np.int64)
    seen = start < stop
    return column[seen], start[seen], stop[seen]


def _runs(starts: Ints, stops: Ints, mask_index: Ints, num_masks: int, num_pixels: int) -> tuple[Ints, Ints]:
    """Runs of zeros and ones in turn, zeros first, of all masks (U,), and where each mask's begin (D + 1,)."""
    # Each mask is a list of borders: 0, its starts and stops in turn, and the end of the image if not already there.
    per_mask = np.bincount(mask_index, minlength=num_masks)
    ends = (np.arange(num_masks) + 1) * num_pixels
    last = np.cumsum(per_mask) - 1
    fills_end = (per_mask > 0) & (np.append(stops, 0)[last] == ends)
    first_run = np.concatenate([[0], np.cumsum(2 * per_mask + ~fills_end)])  # (D + 1,)
    # Without its leading 0, a mask has as many borders as runs.
    borders = np.empty(first_run[-1], np.int64)
    borders[first_run[1:] - 1] = ends
    place = 2 * np.arange(len(starts)) + (first_run[:-1] - 2 * (np.cumsum(per_mask) - per_mask))[mask_index]
    borders[place] = starts
    borders[place + 1] = stops
    return np.diff(borders, prepend=0), first_run


def _to_strings(counts: Ints, first_run: Ints) -> list[bytes]:
    """COCO's strings of the runs of each mask: 5 bits a character, least first, each run from the fourth on as the
    difference from the run two before (maskApi.c rleToString)."""
    value = counts.copy()
    position = np.arange(len(counts)) - np.repeat(first_run[:-1], np.diff(first_run))
    value[2:] -= np.where(position[2:] > 2, counts[:-2], 0)
    magnitude = np.where(value < 0, ~value, value)
    length = np.ones(len(value), np.int64)
    bound = 16  # the top bit of the last character is the sign
    while (longer := magnitude >= bound).any():
        length += longer
        bound *= 32
    ends = np.cumsum(length)
    begins = ends - length
    text = np.empty(ends[-1] if len(ends) else 0, np.uint8)
    for index in range(int(length.max(initial=0))):
        has = length > index
        character = ((value[has] >> (5 * index)) & 31) | np.where(length[has] > index + 1, 32, 0)
        text[begins[has] + index] = character + 48
    borders = np.concatenate([begins, [len(text)]])[first_run]
    packed = text.tobytes()
    return [packed[begin:end] for begin, end in pairwise(borders.tolist())]


def _from_string(text: bytes) -> Ints:
    """The runs of one COCO string (maskApi.c rleFrString)."""
    code = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    is_last = (code & 32) == 0
    if len(code) == 0 or not is_last[-1] or code.min() < 0 or code.max() > 63:
        raise ValueError(f"not a COCO run-length string: {text[:40]!r}")
    run = np.cumsum(is_last) - is_last
    first = np.flatnonzero(np.concatenate([[True], is_last[:-1]]))
    shift = 5 * (np.arange(len(code)) - first[run])
    if shift.max() > 30:  # seven characters hold what 32 bits do
        raise ValueError(f"a run of more than 32 bits in a COCO run-length string: {text[:40]!r}")
    value = np.add.reduceat((code & 31) << shift, first)
    value -= np.where(code[is_last] & 16, 1 << (shift[is_last] + 5), 0)
    value[1::2] = np.cumsum(value[1::2])
    value[2::2] = np.cumsum(value[2::2])
    return value

"""The outlines of a batch of pasted masks on CUDA, found as model/rle.py finds them.

In: probabilities within a cell of zeros, and boxes in the image frame. Out: borders, counted down the columns of the
image: the places where a mask turns from unset to set or back, and the end of the image. The difference of two
neighbours is a run. Every step rounds as NumPy does in model/paste.py and model/rle.py: equal probabilities give equal
borders.
"""

# N images, D places for detections in each, K knots along each side, C columns of pixels walked side by side.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.paste import PasteRule

COLUMNS = 64
"""C: a small mask leaves few lanes idle, and a wide one has ten such blocks to walk."""

NUM_WARPS = 1
"""Two columns a thread, and no warp waits for another."""


def find_borders(
    padded: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    valid: Tensor,
    *,
    threshold: float,
    paste: PasteRule,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Borders (capacity,) of the masks at all places end to end, and for each place (N * D,) where its borders end, how
    many it has and how many pixels are set; all int64. A place that is not valid has none, any other at least one.

    Args:
        padded: float32 (N, D, K, K) probabilities; the outermost are zero.
        boxes: float32 (N, D, 4); one that is not finite lies outside.
        image_sizes: (N, 2) height and width, float32 or integers.
        valid: bool (N, D).
        threshold: what is at least as probable is set.
        paste: where a mask lies in its box.
        capacity: borders for which there is room; those beyond are not written.
    """
    num_places, num_knots = valid.numel(), padded.shape[-1]
    counts, areas = torch.zeros((2, num_places), dtype=torch.int64, device=boxes.device)
    borders = torch.empty(capacity, dtype=torch.int64, device=boxes.device)
    geometry = (padded.contiguous(), boxes.contiguous(), image_sizes.contiguous(), valid.contiguous())

    def outline(ends: Tensor, *, write: bool) -> None:
        _outline[(num_places,)](
            *geometry,
            counts,
            areas,
            ends,
            borders,
            capacity,
            valid.shape[1],
            threshold=threshold,
            num_knots=num_knots,
            paste=paste,
            write=write,
            columns=COLUMNS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # NumPy rounds after each step
        )

    outline(counts, write=False)
    ends = torch.cumsum(counts, 0)  # (N * D,)
    outline(ends, write=True)
    return borders, ends, counts, areas


@triton.jit  # type: ignore[untyped-decorator]
def _outline(
    padded: tl.tensor,
    boxes: tl.tensor,
    image_sizes: tl.tensor,
    valid: tl.tensor,
    run_counts: tl.tensor,
    areas: tl.tensor,
    run_ends: tl.tensor,
    borders: tl.tensor,
    capacity: tl.tensor,
    per_image: tl.tensor,
    threshold: tl.constexpr,
    num_knots: tl.constexpr,
    paste: tl.constexpr,
    write: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """Count the runs and pixels of the mask at one place, or write its borders, which end at ``run_ends``."""
    place = tl.program_id(0)
    offset: tl.constexpr = 0.5 if paste == "torchvision" else -0.5
    size = image_sizes + place // per_image * 2
    height, width = tl.load(size).to(tl.int64), tl.load(size + 1).to(tl.int64)
    is_valid = tl.load(valid + place) != 0
    x1, y1, x2, y2 = _box(boxes + place * 4, is_valid)
    y_axis = _axis(y1, y2, height, num_knots, paste)
    y_start, y_stop, _, _ = y_axis
    x_start, x_stop, x_shift, x_scale = _axis(x1, x2, width, num_knots, paste)
    # One column more than the mask has: it is empty, and at its top ends what is set at the bottom of the last.
    x_end = tl.where((y_start < y_stop) & (x_start < x_stop), x_stop + 1, x_start)
    first = tl.load(run_ends + place) - tl.load(run_counts + place)
    lane = tl.arange(0, columns)
    num_borders, area = tl.zeros_like(height), tl.zeros_like(height)
    bottom_before = 0
    for x_block in range(x_start, x_end, columns):
        x = x_block + lane
        top = x * height
        # The last knot is zero: so is every column beyond it, and the one beyond the mask.
        position = tl.minimum(tl.maximum((x.to(tl.float32) + x_shift) * x_scale - offset, 0.0), num_knots - 1.0)
        left = tl.where(x < x_stop, position.to(tl.int32), num_knots - 1)
        right = tl.minimum(left + 1, num_knots - 1)
        knots = padded + place * num_knots * num_knots
        count, top_set, bottom_set, pixels = _walk(
            knots, left, right, position - left, y_axis, height, threshold, num_knots, offset,
            borders, top, top, capacity, False,
        )  # fmt: skip
        set_above = tl.where(lane == 0, bottom_before, tl.gather(bottom_set, tl.maximum(lane - 1, 0), 0))
        turns = ((top_set != set_above) & (x < width)).to(tl.int32)
        count += turns
        if write:
            index = first + num_borders + tl.cumsum(count, 0) - count
            _put(borders, index, top, turns != 0, capacity)
            _walk(
                knots, left, right, position - left, y_axis, height, threshold, num_knots, offset,
                borders, index + turns, top, capacity, True,
            )  # fmt: skip
        num_borders += tl.sum(count, 0)
        area += tl.sum(pixels, 0)
        bottom_before = tl.sum(tl.where(lane == columns - 1, bottom_set, 0), 0)
    if write:
        _put(borders, first + num_borders, height * width, is_valid, capacity)
    else:
        tl.store(run_counts + place, tl.where(is_valid, num_borders + 1, 0))
        tl.store(areas + place, area)


@triton.jit  # type: ignore[untyped-decorator]
def _box(box: tl.tensor, is_valid: tl.tensor) -> tl.tuple:
    """One box, far outside where it is not finite or not valid, as in paste.paste_axes."""
    x1, y1, x2, y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    limit = float("inf")
    shown = is_valid & (tl.abs(x1) < limit) & (tl.abs(y1) < limit) & (tl.abs(x2) < limit) & (tl.abs(y2) < limit)
    return tl.where(shown, x1, -1e6), tl.where(shown, y1, -1e6), tl.where(shown, x2, -1e6), tl.where(shown, y2, -1e6)


@triton.jit  # type: ignore[untyped-decorator]
def _axis(low: tl.tensor, high: tl.tensor, length: tl.tensor, num_knots: tl.constexpr, paste: tl.constexpr) -> tl.tuple:
    """First pixel, one past the last, shift and scale of one mask along one axis: paste.PasteAxis."""
    mask_side: tl.constexpr = num_knots - 2
    length = length.to(tl.float32)
    if paste == "torchvision":
        half_width = (high - low) * 0.5 * (num_knots / mask_side)
        centre = (high + low) * 0.5
        start, last = _truncate(centre - half_width), _truncate(centre + half_width)
        stop = last + 1
        extent = tl.maximum(last - start + 1, 1.0)
        scale = tl.div_rn(tl.full((), num_knots, tl.float32), extent)
        shift = 0.5 - start
    else:
        extent = high - low
        scale = tl.div_rn(tl.full((), mask_side, tl.float32), tl.where(extent > 0, extent, 1.0))
        margin = tl.div_rn(tl.full((), 0.5, tl.float32), scale)
        start = tl.floor(low - margin)
        stop = tl.where(extent > 0, tl.ceil(high + margin), start)
        shift = 0.5 - low
    start = tl.minimum(tl.maximum(start, 0.0), length)
    stop = tl.minimum(tl.maximum(stop, start), length)
    return start.to(tl.int32), stop.to(tl.int32), shift, scale


@triton.jit  # type: ignore[untyped-decorator]
def _truncate(value: tl.tensor) -> tl.tensor:
    return tl.where(value < 0, tl.ceil(value), tl.floor(value))


@triton.jit  # type: ignore[untyped-decorator]
def _walk(
    knots: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    fraction: tl.tensor,
    y_axis: tl.tuple,
    height: tl.tensor,
    threshold: tl.constexpr,
    num_knots: tl.constexpr,
    offset: tl.constexpr,
    borders: tl.tensor,
    index: tl.tensor,
    top: tl.tensor,
    capacity: tl.tensor,
    write: tl.constexpr,
) -> tl.tuple:
    """Walk down C columns of pixels from knot to knot, each between a ``left`` and a ``right`` column of knots.

    Returns (C,) each: how many borders lie strictly within the column, whether its first and its last pixel are set,
    and how many are. If told to, writes the borders from ``index`` on, counted from ``top``, the column's first pixel.
    """
    y_start, y_stop, y_shift, y_scale = y_axis
    before = tl.zeros_like(fraction)  # knot 0 is zero, and so is the last: what enters also leaves
    count, pixels, top_set, start = tl.zeros_like(left), tl.zeros_like(left), tl.zeros_like(left), tl.zeros_like(left)
    stop = start - 1  # of the interval of set pixels seen last
    for knot in range(1, num_knots):
        row_of_knots = knots + knot * num_knots
        after = tl.load(row_of_knots + left) * (1 - fraction) + tl.load(row_of_knots + right) * fraction
        enters = (before < threshold) & (after >= threshold)
        leaves = (before >= threshold) & (after < threshold)
        if tl.sum((enters | leaves).to(tl.int32), 0) > 0:  # in most steps no column turns, and float64 is dear
            low = before.to(tl.float64)  # as PasteAxis.pixels is
            rise = tl.where(enters | leaves, after - low, 1.0)
            row = (knot - 1 + (threshold - low) / rise + offset) / y_scale.to(tl.float64) - y_shift
            start = tl.where(enters, tl.minimum(tl.maximum(tl.ceil(row), y_start), y_stop).to(tl.int32), start)
            end = tl.minimum(tl.maximum(tl.floor(row) + 1, y_start), y_stop).to(tl.int32)
            is_seen = leaves & (start < end)
            # A gap of less than a pixel leaves the two intervals one.
            is_apart = is_seen & (start != stop)
            closes = is_apart & (stop >= 0)
            begins = is_apart & (start > 0)
            if write:
                _put(borders, index + count, top + stop, closes, capacity)
                _put(borders, index + count + closes.to(tl.int32), top + start, begins, capacity)
            count += closes.to(tl.int32) + begins.to(tl.int32)
            top_set = tl.where(is_seen & (start == 0), 1, top_set)
            pixels += tl.where(is_seen, end - start, 0)
            stop = tl.where(is_seen, end, stop)
        before = after
    closes = (stop >= 0) & (stop < height)
    if write:
        _put(borders, index + count, top + stop, closes, capacity)
    return count + closes.to(tl.int32), top_set, (stop == height).to(tl.int32), pixels


@triton.jit  # type: ignore[untyped-decorator]
def _put(borders: tl.tensor, index: tl.tensor, value: tl.tensor, mask: tl.tensor, capacity: tl.tensor) -> None:
    tl.store(borders + index, value, mask=mask & (index < capacity))

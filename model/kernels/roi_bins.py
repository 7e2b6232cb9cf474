"""The two kernels of RoIAlign.

Forward, a program takes one row of bins and adds up the pixels around each sample, each a row of C channels that one
warp reads at once. Backward, it takes some of the rows of pixels that a box reaches and adds up what the bins hand to
each: a pixel of the map is then added to once for a box, where sample by sample it would be many times.
"""

# R boxes, C channels, S output side, T samples along one side of a bin or 0 where only the device knows how many.
# ruff: noqa: N803 - constants of a kernel are its arguments, and these are written as everywhere.

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.roi_samples import axis, finite_box, neighbours, of_level, reach, sampled_rows, weight_of

_SIZES = [f"{side}_{level}" for side in ("height", "width") for level in range(4)]
"""Arguments that are no reason to compile anew where one is a multiple of 16."""


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def pool_rows(
    level_0: tl.tensor,
    level_1: tl.tensor,
    level_2: tl.tensor,
    level_3: tl.tensor,
    boxes: tl.tensor,
    image_index: tl.tensor,
    level_index: tl.tensor,
    pooled: tl.tensor,
    height_0: tl.tensor,
    height_1: tl.tensor,
    height_2: tl.tensor,
    height_3: tl.tensor,
    width_0: tl.tensor,
    width_1: tl.tensor,
    width_2: tl.tensor,
    width_3: tl.tensor,
    scale_0: tl.tensor,
    scale_1: tl.tensor,
    scale_2: tl.tensor,
    scale_3: tl.tensor,
    C: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    """One row of bins of one box: BLOCK channels of S places of ``pooled`` (R, S, S, C)."""
    box = (tl.program_id(0) // S).to(tl.int64)
    bin_row = tl.program_id(0) % S
    level = tl.load(level_index + box)
    height = of_level(level, height_0, height_1, height_2, height_3)
    width = of_level(level, width_0, width_1, width_2, width_3)
    scale = of_level(level, scale_0, scale_1, scale_2, scale_3)
    x1, y1, x2, y2 = finite_box(boxes + box * 4)
    x_axis = axis(x1, x2, width, scale, S, T, ALIGNED)
    y_axis = axis(y1, y2, height, scale, S, T, ALIGNED)
    row_size = width.to(tl.int64) * C  # 64 bits: a batch of maps can hold more than 2³¹ numbers
    plane = of_level(level, level_0, level_1, level_2, level_3) + tl.load(image_index + box) * height * row_size
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    out = pooled + (box * S + bin_row) * S * C + channels
    rows, weights = sampled_rows(bin_row, 0, y_axis, ROWS)  # (ROWS,)
    for bin_column in range(S):
        if T > 0:
            total = _sum_pixels(plane + rows * row_size, weights, bin_column, x_axis, channels, C, T, BLOCK, SUM)
        else:
            total = tl.zeros([BLOCK], dtype=SUM)
            for first in range(0, y_axis[3], ROWS // 2):
                rows, weights = sampled_rows(bin_row, first, y_axis, ROWS)
                total += _sum_pixels(plane + rows * row_size, weights, bin_column, x_axis, channels, C, T, BLOCK, SUM)
        tl.store(out + bin_column * C, total.to(pooled.dtype.element_ty), mask=channels < C)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_pixels(
    rows: tl.tensor,
    weights: tl.tensor,
    bin_column: tl.tensor,
    x_axis: tl.tuple,
    channels: tl.tensor,
    C: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
) -> tl.tensor:
    """(BLOCK,) of one bin, from pointers to where its rows of pixels start and what they weigh, (ROWS,) both."""
    pixels = rows[:, None] + channels[None, :]  # (ROWS, BLOCK)
    total = tl.zeros(pixels.shape, dtype=SUM)
    if T > 0:
        for sample in tl.static_range(T):
            total = _add_sample(total, pixels, bin_column, sample, x_axis, channels, C, BLOCK)
    else:
        for sample in range(x_axis[3]):
            total = _add_sample(total, pixels, bin_column, sample, x_axis, channels, C, BLOCK)
    return tl.sum(total * weights[:, None], axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _add_sample(
    total: tl.tensor,
    pixels: tl.tensor,
    bin_column: tl.tensor,
    sample: tl.tensor,
    x_axis: tl.tuple,
    channels: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    before, after, before_weight, after_weight = neighbours(bin_column, sample, x_axis)
    left = _load(pixels + before * C, channels[None, :], C, BLOCK).to(total.dtype)
    right = _load(pixels + after * C, channels[None, :], C, BLOCK).to(total.dtype)
    return total + before_weight * left + after_weight * right


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def add_gradients(
    level_0: tl.tensor,
    level_1: tl.tensor,
    level_2: tl.tensor,
    level_3: tl.tensor,
    boxes: tl.tensor,
    image_index: tl.tensor,
    level_index: tl.tensor,
    gradient: tl.tensor,
    height_0: tl.tensor,
    height_1: tl.tensor,
    height_2: tl.tensor,
    height_3: tl.tensor,
    width_0: tl.tensor,
    width_1: tl.tensor,
    width_2: tl.tensor,
    width_3: tl.tensor,
    scale_0: tl.tensor,
    scale_1: tl.tensor,
    scale_2: tl.tensor,
    scale_3: tl.tensor,
    C: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    """One in GROUPS of the rows of pixels that one box reaches: what ``gradient`` (R, S, S, C) hands to each pixel."""
    box = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    level = tl.load(level_index + box)
    height = of_level(level, height_0, height_1, height_2, height_3)
    width = of_level(level, width_0, width_1, width_2, width_3)
    scale = of_level(level, scale_0, scale_1, scale_2, scale_3)
    x1, y1, x2, y2 = finite_box(boxes + box * 4)
    x_axis = axis(x1, x2, width, scale, S, T, ALIGNED)
    y_axis = axis(y1, y2, height, scale, S, T, ALIGNED)
    row_size = width.to(tl.int64) * C  # 64 bits: a batch of maps can hold more than 2³¹ numbers
    plane = of_level(level, level_0, level_1, level_2, level_3) + tl.load(image_index + box) * height * row_size
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    bins = tl.arange(0, COLUMNS)  # (COLUMNS,) of which there are S
    source = gradient + box * S * S * C + tl.minimum(bins, S - 1)[:, None] * C + channels[None, :]
    first_row, last_row = reach(y_axis, S)
    first_column, last_column = reach(x_axis, S)
    for row in range(first_row + group, last_row + 1, GROUPS):
        handed = tl.zeros([COLUMNS, BLOCK], dtype=SUM)  # by each column of bins to this row of pixels
        row_weight = 0.0
        for bin_row in range(S):
            weight = weight_of(row, bin_row, y_axis, T)
            row_weight += weight
            if weight > 0:
                handed += weight * _load(source + bin_row * S * C, channels[None, :], C, BLOCK).to(SUM)
        for column in range(first_column, last_column + 1):
            weights = tl.where(bins < S, weight_of(column, bins, x_axis, T), 0.0)  # (COLUMNS,)
            if row_weight * tl.max(weights, axis=0) > 0:  # not so between the samples of wide bins
                total = tl.sum(handed * weights[:, None], axis=0)  # (BLOCK,)
                tl.atomic_add(plane + row * row_size + column * C + channels, total, mask=channels < C, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _load(pointers: tl.tensor, channels: tl.tensor, C: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    if C % BLOCK > 0:
        return tl.load(pointers, mask=channels < C, other=0.0)
    return tl.load(pointers)  # without a mask no registers have to be cleared before

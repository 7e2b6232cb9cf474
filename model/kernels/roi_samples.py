"""Where the samples of a box lie on its level, for the kernels of RoIAlign.

An axis, as it is handed around here, is a tuple of scalars in pixels of the level: where the first bin starts, how far
it is to the next bin, how far to the next sample, how many samples a bin has, one over that, and the side of the map.
"""

# S output side, T samples along one side of a bin or 0 where only the device knows how many.
# ruff: noqa: N803 - constants of a kernel are its arguments, and these are written as everywhere.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def of_level(level: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor) -> tl.tensor:
    """The one of four that belongs to a level, 0 to 3."""
    return tl.where(level < 2, tl.where(level == 0, first, second), tl.where(level == 2, third, fourth))


@triton.jit  # type: ignore[untyped-decorator]
def finite_box(box: tl.tensor) -> tl.tuple:
    """The four edges a pointer leads to. If one is not finite all are far outside: no sample counts there."""
    x1, y1, x2, y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    limit = float("inf")
    finite = (tl.abs(x1) < limit) & (tl.abs(y1) < limit) & (tl.abs(x2) < limit) & (tl.abs(y2) < limit)
    outside = -1e6
    x1, y1 = tl.where(finite, x1, outside), tl.where(finite, y1, outside)
    return x1, y1, tl.where(finite, x2, outside), tl.where(finite, y2, outside)


@triton.jit  # type: ignore[untyped-decorator]
def axis(
    low: tl.tensor,
    high: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tuple:
    """That of a box from ``low`` to ``high`` in the input frame, on a map of ``size``."""
    offset = 0.5 if ALIGNED else 0.0
    start = low * scale - offset
    length = high * scale - offset - start
    if not ALIGNED:
        length = tl.maximum(length, 1.0)
    bin_size = tl.div_rn(length, tl.full([], S, tl.float32))  # rounded well: of 7 pixels in 7 bins, none gets 2 samples
    if T > 0:
        samples = tl.full([], T, tl.int32)
        share = tl.full([], 1.0 / T, tl.float32)
    else:
        samples = tl.maximum(tl.ceil(bin_size), 0.0).to(tl.int32)  # none in a box that is turned inside out
        share = 1.0 / tl.maximum(samples, 1).to(tl.float32)
    step = tl.div_rn(bin_size, tl.maximum(samples, 1).to(tl.float32))
    return start, bin_size, step, samples, share, size


@triton.jit  # type: ignore[untyped-decorator]
def place_of(bin: tl.tensor, sample: tl.tensor, axis: tl.tuple) -> tl.tensor:
    """Where a sample reads, in 0 … size - 1; or -2, which is near no pixel, if it lies over a pixel outside."""
    start, bin_size, step, _samples, _share, size = axis
    position = start + bin * bin_size + (sample + 0.5) * step
    inside = (position >= -1.0) & (position <= size)
    return tl.where(inside, tl.minimum(tl.maximum(position, 0.0), size - 1.0), -2.0)


@triton.jit  # type: ignore[untyped-decorator]
def neighbours(bin: tl.tensor, sample: tl.tensor, axis: tl.tuple) -> tl.tuple:
    """The pixels before and after a sample, and what they weigh in the mean of a bin."""
    place = place_of(bin, sample, axis)
    before = tl.maximum(place, 0.0).to(tl.int32)
    after_weight = tl.where(place >= 0.0, (place - before) * axis[4], 0.0)
    before_weight = tl.where(place >= 0.0, axis[4] - after_weight, 0.0)
    return before, tl.minimum(before + 1, axis[5] - 1), before_weight, after_weight


@triton.jit  # type: ignore[untyped-decorator]
def sampled_rows(bin: tl.tensor, first: tl.tensor, axis: tl.tuple, ROWS: tl.constexpr) -> tl.tuple:
    """Neighbours of the samples from ``first`` on, two of each, and what they weigh, (ROWS,) both."""
    sample = first + tl.arange(0, ROWS) // 2
    before, after, before_weight, after_weight = neighbours(bin, sample, axis)
    is_after = tl.arange(0, ROWS) % 2 == 1
    weight = tl.where(is_after, after_weight, before_weight)
    return tl.where(is_after, after, before), tl.where(sample < axis[3], weight, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def reach(axis: tl.tuple, S: tl.constexpr) -> tl.tuple:
    """The first and the last pixel that a sample can be near. A box may be turned inside out."""
    start, bin_size, step, _samples, _share, size = axis
    one = start + 0.5 * step
    other = start + S * bin_size - 0.5 * step
    other = tl.where(tl.abs(bin_size) < float("inf"), other, one)  # no sample counts of a box too wide for float32
    first = tl.minimum(tl.maximum(tl.minimum(one, other), 0.0), size - 1.0)
    last = tl.minimum(tl.maximum(tl.maximum(one, other) + 1.0, 0.0), size - 1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def weight_of(pixel: tl.tensor, bin: tl.tensor, axis: tl.tuple, T: tl.constexpr) -> tl.tensor:
    """What a pixel weighs in the mean of a bin: of each sample 1 minus its distance, if that is less than 1."""
    total = tl.zeros_like(axis[0] + bin)
    if T > 0:
        for sample in tl.static_range(T):
            total += tl.maximum(1.0 - tl.abs(place_of(bin, sample, axis) - pixel), 0.0)
    else:
        for sample in range(axis[3]):
            total += tl.maximum(1.0 - tl.abs(place_of(bin, sample, axis) - pixel), 0.0)
    return total * axis[4]

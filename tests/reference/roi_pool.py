"""RoIPool, one cell after the other (Girshick 2015; the rules of rounding are torchvision's)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def nearest(value: float) -> int:
    """The nearest whole number; halves away from zero."""
    return math.floor(value + 0.5) if value >= 0 else math.ceil(value - 0.5)


def bin_edges(first: int, last: int, output_size: int, size: int) -> list[tuple[int, int]]:
    """First cell and end of each bin, inside a map that is `size` long."""
    length = max(last - first + 1, 1)
    step = np.float32(length) / np.float32(output_size)  # in float32: rounding up hangs on its last bit
    edges = []
    for index in range(output_size):
        start = math.floor(np.float32(index) * step) + first
        end = math.ceil(np.float32(index + 1) * step) + first
        edges.append((min(max(start, 0), size), min(max(end, 0), size)))
    return edges


def roi_pool(plane: Floats, box: Floats, stride: int, *, output_size: int) -> Floats:
    """Pool one box (4,) of the input frame from one plane (H, W): (S, S)."""
    x1, y1, x2, y2 = (nearest(edge / stride) for edge in box)
    pooled = np.zeros((output_size, output_size))
    for row, (top, bottom) in enumerate(bin_edges(y1, y2, output_size, plane.shape[0])):
        for column, (left, right) in enumerate(bin_edges(x1, x2, output_size, plane.shape[1])):
            values = [plane[y, x] for y in range(top, bottom) for x in range(left, right)]
            pooled[row, column] = max(values, default=0.0)
    return pooled

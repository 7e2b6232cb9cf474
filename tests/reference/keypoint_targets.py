"""The cell of each keypoint, one at a time (Mask R-CNN section 5; the edges are torchvision's)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def axis_cell(value: float, low: float, high: float, side: int) -> int | None:
    """The cell of a coordinate between two edges; None outside."""
    if value == high:
        return side - 1
    cell = math.floor((value - low) * side / (high - low))
    return cell if 0 <= cell < side else None


def cell(keypoint: Sequence[float], box: Sequence[float], side: int) -> int | None:
    """Index in the heatmap; None for a keypoint that is not labelled or lies outside."""
    x, y, visibility = keypoint
    column, row = axis_cell(x, box[0], box[2], side), axis_cell(y, box[1], box[3], side)
    if visibility <= 0 or column is None or row is None:
        return None
    return row * side + column

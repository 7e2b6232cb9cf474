"""Which cells' centres polygons hold, one centre and one edge at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def holds(part: Floats, x: float, y: float) -> bool:
    """Even-odd rule: whether a ray from the point to the left meets the outline an odd number of times."""
    inside = False
    for (x1, y1), (x2, y2) in zip(part.tolist(), np.roll(part, -1, axis=0).tolist(), strict=True):
        if min(y1, y2) <= y < max(y1, y2) and x >= x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            inside = not inside
    return inside


def crop(parts: Sequence[Floats], box: Sequence[float], side: int) -> Floats:
    """(M, M) of the union of the parts, cut to the box, which counts as at least a tenth of a pixel wide and high."""
    x1, y1, width, height = box[0], box[1], max(box[2] - box[0], 0.1), max(box[3] - box[1], 0.1)
    cells = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            x, y = x1 + (column + 0.5) * width / side, y1 + (row + 0.5) * height / side
            cells[row, column] = any(holds(part, x, y) for part in parts)
    return cells

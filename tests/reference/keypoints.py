"""Keypoints of one heatmap, one pixel after the other (torchvision's places; the softmax score is detectron2's)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    if d < 2:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return 0.0


def resized(plane: Floats, height: int, width: int) -> Floats:
    """A plane (S, T) at another size, bicubic, its border repeated outside."""
    side_y, side_x = plane.shape
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            y = (row + 0.5) * side_y / height - 0.5
            x = (column + 0.5) * side_x / width - 0.5
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = plane[min(max(i, 0), side_y - 1), min(max(j, 0), side_x - 1)]
                    result[row, column] += cubic(y - i) * cubic(x - j) * value
    return result


def over_box(plane: Floats, box: Floats) -> tuple[Floats, float, float]:
    """The heatmap in the box's whole pixels, and the width and height of one of them."""
    width, height = max(box[2] - box[0], 1.0), max(box[3] - box[1], 1.0)
    pixels = resized(plane, math.ceil(height), math.ceil(width))
    return pixels, width / math.ceil(width), height / math.ceil(height)


def keypoint(plane: Floats, box: Floats, *, softmax: bool) -> tuple[float, float, float]:
    """x, y and score."""
    pixels, pixel_width, pixel_height = over_box(plane, box)
    best, best_row, best_column = -math.inf, 0, 0
    for row in range(pixels.shape[0]):
        for column in range(pixels.shape[1]):
            if pixels[row, column] > best:
                best, best_row, best_column = float(pixels[row, column]), row, column
    score = 1 / sum(math.exp(value - best) for value in plane.flatten()) if softmax else best
    return box[0] + (best_column + 0.5) * pixel_width, box[1] + (best_row + 0.5) * pixel_height, score

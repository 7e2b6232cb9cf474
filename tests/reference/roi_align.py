"""RoIAlign, one sample after the other (Mask R-CNN section 3; the rules at the borders are torchvision's)."""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sample(plane: Floats, y: float, x: float) -> float:
    """Bilinear value of a plane (H, W) at continuous indices; zero more than one pixel outside."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
    lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
    return float(upper * (1 - (y - top)) + lower * (y - top))


def roi_align(
    plane: Floats, box: Floats, stride: int, *, output_size: int, sampling_ratio: int, aligned: bool
) -> Floats:
    """Pool one box (4,) of the input frame from one plane (H, W): (S, S)."""
    x1, y1, x2, y2 = box / stride - (0.5 if aligned else 0.0)
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    pooled = np.zeros((output_size, output_size))
    for row in range(output_size):
        for column in range(output_size):
            values = [
                sample(
                    plane,
                    y1 + (row + (i + 0.5) / sampling_ratio) * height / output_size,
                    x1 + (column + (j + 0.5) / sampling_ratio) * width / output_size,
                )
                for i in range(sampling_ratio)
                for j in range(sampling_ratio)
            ]
            pooled[row, column] = sum(values) / len(values)
    return pooled


def level(box: Floats, num_levels: int) -> int:
    """FPN eq. 1 for a pyramid that begins at level 2."""
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    if side == 0:
        return 0
    return min(max(math.floor(4 + math.log2(side / 224) + 1e-6), 2), num_levels + 1) - 2

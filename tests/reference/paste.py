"""Paste, one pixel after the other, into an image of its own for each mask."""

import numpy as np
from numpy.typing import NDArray

from model.structures import ImageSize

Floats = NDArray[np.float32]


def cell(mask: Floats, row: int, column: int) -> float:
    """A cell of the mask (M, M), zero outside."""
    side = len(mask)
    return float(mask[row, column]) if 0 <= row < side and 0 <= column < side else 0.0


def interpolate(mask: Floats, y: float, x: float) -> float:
    """Bilinear value at continuous indices of the mask (M, M), zero outside."""
    top, left = int(np.floor(y)), int(np.floor(x))
    upper = cell(mask, top, left) * (1 - (x - left)) + cell(mask, top, left + 1) * (x - left)
    lower = cell(mask, top + 1, left) * (1 - (x - left)) + cell(mask, top + 1, left + 1) * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def paste_torchvision(mask: Floats, box: Floats, size: ImageSize) -> Floats:
    """A box widened by one cell of zeros all round and truncated to whole pixels, first and last inclusive."""
    padded = len(mask) + 2
    image = np.zeros(size, np.float32)
    centre, half = (box[2:] + box[:2]) * np.float32(0.5), (box[2:] - box[:2]) * np.float32(0.5)
    half = half * np.float32(padded / len(mask))
    first, last = np.trunc(centre - half).astype(int), np.trunc(centre + half).astype(int)
    width, height = np.maximum(last - first + 1, 1)
    for y in range(max(first[1], 0), min(last[1] + 1, size.height)):
        for x in range(max(first[0], 0), min(last[0] + 1, size.width)):
            # -1: from indices of the padded mask to those of the mask.
            row = max((y - first[1] + 0.5) * padded / height - 0.5, 0) - 1
            column = max((x - first[0] + 0.5) * padded / width - 0.5, 0) - 1
            image[y, x] = interpolate(mask, row, column)
    return image


def paste_detectron2(mask: Floats, box: Floats, size: ImageSize) -> Floats:
    """A continuous box, sampled at pixel centres; a box without extent shows nothing."""
    side = len(mask)
    image = np.zeros(size, np.float32)
    x1, y1, x2, y2 = (float(edge) for edge in box)
    if x2 <= x1 or y2 <= y1:
        return image
    for y in range(size.height):
        for x in range(size.width):
            row, column = (y + 0.5 - y1) / (y2 - y1) * side - 0.5, (x + 0.5 - x1) / (x2 - x1) * side - 0.5
            image[y, x] = interpolate(mask, row, column)
    return image

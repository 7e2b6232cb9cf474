"""Anchors and box coding, one number at a time."""

from __future__ import annotations

import math

Box = tuple[float, float, float, float]


def anchor(size: float, aspect_ratio: float, y: int, x: int, stride: tuple[int, int]) -> Box:
    """The anchor, not rounded, of cell (y, x) where cells are `stride` (vertical, horizontal) pixels apart."""
    width, height = size / math.sqrt(aspect_ratio), size * math.sqrt(aspect_ratio)
    center_y, center_x = y * stride[0], x * stride[1]
    return center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2


def encode(target: Box, box: Box, weights: Box) -> Box:
    """The deltas by which `box` becomes `target`: R-CNN (Girshick et al. 2014) appendix C."""
    width, height = box[2] - box[0], box[3] - box[1]
    target_width, target_height = target[2] - target[0], target[3] - target[1]
    return (
        weights[0] * ((target[0] + target[2]) - (box[0] + box[2])) / 2 / width,
        weights[1] * ((target[1] + target[3]) - (box[1] + box[3])) / 2 / height,
        weights[2] * math.log(target_width / width),
        weights[3] * math.log(target_height / height),
    )

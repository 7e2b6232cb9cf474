"""What the keypoint head learns: of each keypoint the one cell of the heatmap it lies in (Mask R-CNN section 5)."""

# R regions, K keypoints of an instance, S side of the heatmap.

from __future__ import annotations

import torch
from torch import Tensor

from model.boxes import full_precision


@torch.no_grad()
def heatmap_targets(keypoints: Tensor, boxes: Tensor, *, side: int) -> tuple[Tensor, Tensor]:
    """(R, K) int64 cell, y * S + x, of each keypoint in its region's heatmap, and (R, K) bool whether it is there.

    `keypoints` (R, K, 3) are x, y, visibility of the instance each of `boxes` (R, 4) is matched to. One that is not
    labelled or lies outside the box has cell 0 and is not there. Cells are half-open, but the right and lower edge of
    the box belong to the last, as in torchvision.
    """
    keypoints, boxes = full_precision(keypoints), full_precision(boxes)
    low, high = boxes[:, None, :2], boxes[:, None, 2:]  # (R, 1, 2)
    points = keypoints[..., :2]  # (R, K, 2)
    cell = ((points - low) * (side / (high - low))).floor()
    cell = cell.masked_fill(points == high, side - 1)
    valid = ((cell >= 0) & (cell < side)).all(dim=-1) & (keypoints[..., 2] > 0)  # (R, K)
    index = (cell[..., 1] * side + cell[..., 0]).where(valid, 0)
    return index.to(torch.int64), valid

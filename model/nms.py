"""Non-maximum suppression over many segments at once: (image, level) of proposals, (image, class) of detections.

In: boxes, scores and the segment of each box. Out: indices of the boxes kept, best score first.
Source: Faster R-CNN (Ren et al. 2015) section 3.3; IoU and comparison as in torchvision.ops.nms.
"""

# B boxes over all segments, Q pairs of boxes of one segment.

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms


def segment_nms(boxes: Tensor, scores: Tensor, segments: Tensor, iou_threshold: float) -> Tensor:
    """Indices (int64) of the boxes of (B, 4) kept, in decreasing score order over all segments, ties by lower index.

    A box goes if a kept box of its own segment with a better score overlaps it by more than ``iou_threshold``. Boxes
    are compared as they are: shifting segments apart, as is often done, rounds coordinates and changes decisions.
    """
    by_score = torch.argsort(scores, descending=True, stable=True)  # (B,)
    order = by_score[torch.argsort(segments[by_score], stable=True)]  # (B,) by segment, then by score
    ordered = boxes[order]
    kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    _, counts = torch.unique_consecutive(segments[order], return_counts=True)
    # Ranks stand in for scores, so that equal scores keep their order.
    ranks = -torch.arange(len(boxes), dtype=torch.float32, device=boxes.device)
    start = 0
    for count in counts.tolist():
        if count > 1:
            run = slice(start, start + count)
            kept[order[run]] = False
            kept[order[run][nms(ordered[run], ranks[:count], iou_threshold)]] = True
        start += count
    return by_score[kept[by_score]]

"""Non-maximum suppression over many segments at once: (image, level) of proposals, (image, class) of detections.

In: boxes, scores and the segment of each box. Out: indices of the boxes kept, best score first.
Source: Faster R-CNN (Ren et al. 2015) section 3.3; IoU and comparison as in torchvision.ops.nms.
"""

# B boxes over all segments, Q pairs of boxes of one segment, E of them that overlap too much.

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

_SMALL_SEGMENT = 64
"""Up to so many boxes, looking at all pairs of all segments together costs less than a call of nms for each."""


def segment_nms(boxes: Tensor, scores: Tensor, segments: Tensor, iou_threshold: float) -> Tensor:
    """Indices (int64) of the boxes of (B, 4) kept, in decreasing score order over all segments, ties by lower index.

    A box goes if a kept box of its own segment with a better score overlaps it by more than ``iou_threshold``. Boxes
    are compared as they are: shifting segments apart, as is often done, rounds coordinates and changes decisions.
    """
    by_score = torch.argsort(scores, descending=True, stable=True)  # (B,)
    order = by_score[torch.argsort(segments[by_score], stable=True)]  # (B,) by segment, then by score
    ordered = boxes[order]
    _, counts = torch.unique_consecutive(segments[order], return_counts=True)
    kept = _suppress_pairs(ordered, counts, iou_threshold)  # (B,) of ordered
    # Ranks stand in for scores, so that equal scores keep their order.
    ranks = -torch.arange(len(boxes), dtype=torch.float32, device=boxes.device)
    start = 0
    for count in counts.tolist():
        if count > _SMALL_SEGMENT:
            kept[start : start + count] = False
            kept[start + nms(ordered[start : start + count], ranks[:count], iou_threshold)] = True
        start += count
    kept_by_index = torch.empty_like(kept)
    kept_by_index[order] = kept
    return by_score[kept_by_index[by_score]]


def _suppress_pairs(ordered: Tensor, counts: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes (B,) stay in the small segments, whose boxes lie together, best first; all of the others do."""
    ends = torch.cumsum(counts, 0).repeat_interleave(counts)  # (B,) end of the segment of each box
    later = ends - torch.arange(1, len(ordered) + 1, device=ordered.device)  # (B,) worse boxes of the segment
    later.masked_fill_((counts > _SMALL_SEGMENT).repeat_interleave(counts), 0)
    better = torch.arange(len(ordered), device=ordered.device).repeat_interleave(later)  # (Q,)
    worse = torch.arange(1, len(better) + 1, device=ordered.device)
    worse += better - (torch.cumsum(later, 0) - later).repeat_interleave(later)  # (Q,)
    # The threshold is a double, and torchvision compares it as one.
    overlaps = _iou(ordered, better, worse).double() > iou_threshold
    return _resolve(better[overlaps], worse[overlaps], len(ordered))


def _iou(boxes: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """IoU (Q,) of pairs of boxes in the steps of torchvision's kernel; of two empty ones NaN, which exceeds nothing."""
    # index_select of one column after the other: several times faster here than boxes[first].
    x1, y1, x2, y2 = boxes.t().contiguous()  # (B,) each
    width = torch.minimum(x2.index_select(0, first), x2.index_select(0, second))
    width = width.sub_(torch.maximum(x1.index_select(0, first), x1.index_select(0, second))).clamp_(min=0)
    height = torch.minimum(y2.index_select(0, first), y2.index_select(0, second))
    height = height.sub_(torch.maximum(y1.index_select(0, first), y1.index_select(0, second))).clamp_(min=0)
    intersection = width.mul_(height)
    areas = (x2 - x1) * (y2 - y1)
    union = areas.index_select(0, first).add_(areas.index_select(0, second)).sub_(intersection)
    return intersection.div_(union)


def _resolve(better: Tensor, worse: Tensor, num_boxes: int) -> Tensor:
    """Which boxes (B,) stay if the better box of each of the E pairs, where it stays, removes the worse one."""
    kept = torch.ones(num_boxes, dtype=torch.bool, device=better.device)
    while len(better):
        # No pair is left that could remove a box that is the worse of none: such a box stays for good.
        is_worse = torch.zeros_like(kept)
        is_worse[worse] = True
        kept[worse[~is_worse[better]]] = False
        open_pairs = kept[better] & kept[worse]
        better, worse = better[open_pairs], worse[open_pairs]
    return kept

"""How far the detections of one system are from those of another for the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.structures import Detections

MATCHED_IOU = 0.9
"""Of the boxes of two detections of one label that count as the same."""
SURE, KEPT_SCORE, KEPT_MASK_IOU = 0.3, 0.02, 0.95
"""From which score on detections must be kept, and by how much their score and their mask may then change."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Over all images; of what is matched, medians and the worst percentile."""

    detections: int
    """Of the reference."""
    matched: float
    """Share of those that have their own counterpart."""
    box: float
    """Pixels that 99 of 100 matched boxes are within."""
    score: float
    """As much for scores."""
    mask_iou: float
    """What 99 of 100 matched masks have at least; 1 where there are none."""

    def __str__(self) -> str:
        return (
            f"{self.matched:.1%} of {self.detections} matched, box {self.box:.3f} px, score {self.score:.4f}, "
            f"mask IoU {self.mask_iou:.3f}"
        )


def agreement(found: Sequence[Detections], reference: Sequence[Detections], *, min_score: float = 0.0) -> Agreement:
    """Of the reference's detections from `min_score` on, best first, each with the free one it overlaps most."""
    boxes, scores, masks, matched, total = [], [], [], 0, 0
    for ours, theirs in zip(found, reference, strict=True):
        wanted = np.flatnonzero(theirs.scores >= min_score)
        total += len(wanted)
        for one, other in _pairs(ours, theirs, wanted):
            matched += 1
            boxes.append(float(np.abs(ours.boxes[one] - theirs.boxes[other]).max()))
            scores.append(abs(float(ours.scores[one] - theirs.scores[other])))
            if theirs.masks:
                masks.append(float(coco_mask.iou([ours.masks[one]], [theirs.masks[other]], [0])[0, 0]))
    return Agreement(
        detections=total,
        matched=matched / total if total else 1.0,
        box=float(np.quantile(boxes, 0.99)) if boxes else 0.0,
        score=float(np.quantile(scores, 0.99)) if scores else 0.0,
        mask_iou=float(np.quantile(masks, 0.01)) if masks else 1.0,
    )


def share_kept(found: Sequence[Detections], reference: Sequence[Detections]) -> float:
    """Of the reference's detections from the score SURE on, those that have a counterpart of nearly the same box, score
    and mask; 1 where there are none."""
    kept = total = 0
    for ours, theirs in zip(found, reference, strict=True):
        wanted = np.flatnonzero(theirs.scores >= SURE)
        total += len(wanted)
        for one, other in _pairs(ours, theirs, wanted):
            same_score = abs(float(ours.scores[one] - theirs.scores[other])) <= KEPT_SCORE
            masks_iou = coco_mask.iou([ours.masks[one]], [theirs.masks[other]], [0])[0, 0] if theirs.masks else 1.0
            kept += same_score and masks_iou >= KEPT_MASK_IOU
    return kept / total if total else 1.0


def _pairs(ours: Detections, theirs: Detections, wanted: NDArray[np.int64]) -> list[tuple[int, int]]:
    if len(ours) == 0 or len(wanted) == 0:
        return []
    overlap = coco_mask.iou(_corner_and_sides(ours.boxes), _corner_and_sides(theirs.boxes[wanted]), [0] * len(wanted))
    overlap = np.where(ours.category_ids[:, None] == theirs.category_ids[wanted][None], overlap, 0)
    pairs = []
    for column, other in enumerate(wanted.tolist()):
        best = int(overlap[:, column].argmax())
        if overlap[best, column] >= MATCHED_IOU:
            pairs.append((best, other))
            overlap[best] = 0
    return pairs


def _corner_and_sides(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)

"""How far our detections are from torchvision's for the same image, each detection matched to its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from model.rle import decode
from model.structures import Detections

BOX_TOLERANCE = 0.05
"""Pixels."""
SCORE_TOLERANCE = 1e-4
KEYPOINT_TOLERANCE = 0.1
"""Pixels."""
PROBABILITY_TOLERANCE = 1e-3
"""Mask pixels whose probability is as near as this to one half may fall either way."""
LOGIT_TOLERANCE = 1e-4
"""Of two pixels of a heatmap whose logits are as near as this, either may be the keypoint."""


@dataclass(frozen=True)
class Difference:
    """The worst over one image, or over several."""

    count: int = 0
    """Difference of the number of detections."""
    unmatched: int = 0
    """Detections without one of the same label within the tolerances."""
    box: float = 0.0
    score: float = 0.0
    mask_pixels: int = 0
    """Pixels that differ though their probability is not near one half."""
    near_pixels: int = 0
    """Pixels that differ and whose probability is near one half."""
    keypoint: float = 0.0
    """Pixels, of keypoints whose place is certain."""
    near_keypoints: int = 0
    """Keypoints elsewhere whose place is no less likely in the peer's own heatmap."""
    keypoint_score: float = 0.0

    def is_within(self) -> bool:
        """Whether the two answers count as equal."""
        exact = (self.count, self.unmatched, self.mask_pixels) == (0, 0, 0)
        return exact and self.keypoint <= KEYPOINT_TOLERANCE

    def worst(self, other: Difference) -> Difference:
        """The larger of each."""
        return Difference(*(max(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)))


def compare(ours: Detections, theirs: dict[str, Tensor]) -> Difference:
    """Theirs is what torchvision returns: boxes, labels, scores, and where the network has the head mask probabilities
    (D, 1, H, W), or keypoints (D, K, 3) and their scores (D, K); of these it may hold the heatmaps (D, K, S, S) and the
    boxes in the input that they lie over (D, 4)."""
    boxes, labels, scores = (theirs[name].numpy() for name in ("boxes", "labels", "scores"))
    free = np.ones(len(ours), dtype=bool)
    worst = Difference(count=abs(len(ours) - len(labels)))
    assert ("masks" in theirs) == (len(ours.masks) > 0)
    assert ("keypoints" in theirs) == (ours.keypoints is not None)
    for index, (box, label, score) in enumerate(zip(boxes, labels, scores, strict=True)):
        # Nearly equal scores may stand in another order, so position says nothing.
        box_errors = np.abs(ours.boxes - box).max(axis=1, initial=0)
        score_errors = np.abs(ours.scores - score)
        fits = free & (ours.category_ids == label) & (box_errors <= BOX_TOLERANCE) & (score_errors <= SCORE_TOLERANCE)
        if not fits.any():
            worst = Difference(**{**vars(worst), "unmatched": worst.unmatched + 1})
            continue
        match = int(np.where(fits, box_errors, np.inf).argmin())
        free[match] = False
        found = Difference(box=float(box_errors[match]), score=float(score_errors[match]))
        if "masks" in theirs:
            mask = theirs["masks"][index, 0].numpy()
            wrong = decode(ours.masks[match]) != (mask >= 0.5)
            near = np.abs(mask - 0.5) <= PROBABILITY_TOLERANCE
            found = replace(found, mask_pixels=int((wrong & ~near).sum()), near_pixels=int((wrong & near).sum()))
        if ours.keypoints is not None:
            points, point_scores = theirs["keypoints"][index].numpy(), theirs["keypoints_scores"][index].numpy()
            errors = np.abs(ours.keypoints[match, :, :2] - points[:, :2]).max(axis=1)  # (K,)
            likely = [
                number
                for number in np.flatnonzero(errors > KEYPOINT_TOLERANCE).tolist()
                if "heatmaps" in theirs and _shortfall(ours, match, theirs, index, number) <= LOGIT_TOLERANCE
            ]
            found = replace(
                found,
                keypoint=float(np.delete(errors, likely).max(initial=0)),
                near_keypoints=len(likely),
                keypoint_score=float(np.abs(ours.keypoints[match, :, 2] - point_scores).max()),
            )
        worst = worst.worst(found)
    return worst


def _shortfall(ours: Detections, match: int, theirs: dict[str, Tensor], index: int, number: int) -> float:
    """How far the logit at our place of a keypoint is below the largest of their heatmap, brought to the box's size."""
    assert ours.keypoints is not None
    x1, y1, x2, y2 = theirs["input_boxes"][index].tolist()
    width, height = (max(1, math.ceil(side)) for side in (x2 - x1, y2 - y1))
    heatmap = theirs["heatmaps"][index, number][None, None]  # (1, 1, S, S)
    logits = F.interpolate(heatmap, size=(height, width), mode="bicubic", align_corners=False)[0, 0]  # (H, W)
    left, top, right, bottom = ours.boxes[match].tolist()
    x, y = ours.keypoints[match, number, :2].tolist()
    column = min(width - 1, int((x - left) / (right - left) * width))
    row = min(height - 1, int((y - top) / (bottom - top) * height))
    return float(logits.max() - logits[row, column])

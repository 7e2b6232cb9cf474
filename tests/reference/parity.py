"""How far our detections are from torchvision's for the same image, each detection matched to its own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
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
    """Pixels."""
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
    (D, 1, H, W), keypoints (D, K, 3) and their scores (D, K)."""
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
            found = replace(
                found,
                keypoint=float(np.abs(ours.keypoints[match, :, :2] - points[:, :2]).max()),
                keypoint_score=float(np.abs(ours.keypoints[match, :, 2] - point_scores).max()),
            )
        worst = worst.worst(found)
    return worst

"""How far two systems are apart, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pycocotools import mask as coco_mask

from jobs.agreement import agreement, share_kept
from model.structures import Detections, ImageSize


def _squares(*corners: tuple[int, int], label: int = 1) -> Detections:
    """Squares of 10 pixels, each scored a little less than the one before."""
    bitmaps = np.zeros((len(corners), 40, 40), dtype=np.uint8)
    for bitmap, (x, y) in zip(bitmaps, corners, strict=True):
        bitmap[y : y + 10, x : x + 10] = 1
    count = len(corners)
    return Detections(
        size=ImageSize(40, 40),
        boxes=np.array([[x, y, x + 10, y + 10] for x, y in corners], dtype=np.float32).reshape(-1, 4),
        scores=np.linspace(0.9, 0.8, count, dtype=np.float32),
        category_ids=np.full(count, label),
        categories=["square"] * count,
        masks=[coco_mask.encode(np.asfortranarray(bitmap)) for bitmap in bitmaps],
        areas=np.full(count, 100),
    )


def test_the_same_detections_agree_in_any_order() -> None:
    reference = _squares((0, 0), (20, 20))
    turned = _squares((20, 20), (0, 0))
    found = agreement([replace(turned, scores=turned.scores[::-1].copy())], [reference])
    assert (found.detections, found.matched, found.box, found.score, found.mask_iou) == (2, 1.0, 0.0, 0.0, 1.0)


def test_one_that_lies_elsewhere_is_of_another_label_or_is_missing_is_not_matched() -> None:
    reference = [_squares((0, 0), (20, 20))]
    assert agreement([_squares((0, 0), (25, 20))], reference).matched == 0.5
    assert agreement([_squares((0, 0), (20, 20), label=2)], reference).matched == 0.0
    assert agreement([_squares((0, 0))], reference).matched == 0.5


def test_each_detection_counts_once_and_low_scores_not_at_all() -> None:
    twice = [_squares((0, 0), (0, 0))]
    assert agreement([_squares((0, 0))], twice).matched == 0.5
    assert agreement([_squares((0, 0))], twice, min_score=0.85).matched == 1.0


def test_a_detection_is_kept_with_nearly_its_score_and_its_mask() -> None:
    reference = _squares((0, 0), (20, 20))
    assert share_kept([reference], [reference]) == 1.0
    lower = reference.scores - np.array([0.01, 0.03], dtype=np.float32)
    assert share_kept([replace(reference, scores=lower)], [reference]) == 0.5
    wrong_masks = [reference.masks[0], reference.masks[0]]
    assert share_kept([replace(reference, masks=wrong_masks)], [reference]) == 0.5
    assert share_kept([_squares((0, 0))], [reference]) == 0.5
    unsure = replace(reference, scores=np.array([0.9, 0.29], dtype=np.float32))
    assert share_kept([_squares((0, 0))], [unsure]) == 1.0
    assert share_kept([_squares()], [_squares()]) == 1.0

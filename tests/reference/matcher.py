"""Matching, one pair of boxes at a time (Faster R-CNN section 3.1.2; ties and low quality as in torchvision)."""

from __future__ import annotations

from collections.abc import Sequence

Box = Sequence[float]


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection(box: Box, other: Box) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0) * max(height, 0)


def iou(box: Box, other: Box) -> float:
    shared = intersection(box, other)
    union = area(box) + area(other) - shared
    return shared / union if union > 0 else 0.0


def match(
    boxes: Sequence[Box], gt_boxes: Sequence[Box], *, positive_iou: float, negative_iou: float, allow_low_quality: bool
) -> tuple[list[int], list[int]]:
    """Of the boxes of one image: the place of the ground truth box, 0 for those not positive, and 1, 0 or -1."""
    places = [place for place, gt_box in enumerate(gt_boxes) if area(gt_box) > 0]
    most = {place: max((iou(gt_boxes[place], box) for box in boxes), default=0.0) for place in places}
    gt_index, labels = [], []
    for box in boxes:
        best, label = None, 0
        for place in places:
            if best is None or iou(gt_boxes[place], box) > iou(gt_boxes[best], box):
                best = place
        if best is not None:
            overlap = iou(gt_boxes[best], box)
            label = 1 if overlap >= positive_iou else 0 if overlap < negative_iou else -1
            if allow_low_quality and any(iou(gt_boxes[place], box) == most[place] for place in places):
                label = 1
        gt_index.append(best if label == 1 and best is not None else 0)
        labels.append(label)
    return gt_index, labels


def ignore_crowd(
    labels: Sequence[int], boxes: Sequence[Box], crowd_boxes: Sequence[Box], threshold: float
) -> list[int]:
    """The labels of one image, negatives that lie in a crowd region turned to -1."""
    found = []
    for label, box in zip(labels, boxes, strict=True):
        shares = [intersection(box, crowd) / area(box) for crowd in crowd_boxes if area(box) > 0]
        found.append(-1 if label == 0 and any(share >= threshold for share in shares) else label)
    return found

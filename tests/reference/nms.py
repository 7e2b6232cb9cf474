"""Non-maximum suppression, one box after the other, in NumPy's float32."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def iou(first: Floats, second: Floats) -> np.float32:
    """IoU of two boxes (4,), each step rounded to float32 as in torchvision's kernel; NaN for two empty ones."""
    zero = np.float32(0)
    width = max(zero, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(zero, min(first[3], second[3]) - max(first[1], second[1]))
    intersection = np.float32(width * height)
    union = area(first) + area(second) - intersection
    return np.float32(np.nan) if union == 0 else np.float32(intersection / union)


def area(box: Floats) -> np.float32:
    return np.float32((box[2] - box[0]) * (box[3] - box[1]))


def segment_nms(boxes: Floats, scores: Floats, segments: NDArray[np.int64], iou_threshold: float) -> list[int]:
    """Indices kept, best score first, ties by lower index."""
    kept: list[int] = []
    for candidate in sorted(range(len(boxes)), key=lambda index: (-scores[index], index)):
        rivals = [index for index in kept if segments[index] == segments[candidate]]
        if not any(float(iou(boxes[index], boxes[candidate])) > iou_threshold for index in rivals):
            kept.append(candidate)
    return kept


def sorted_nms(
    boxes: Floats, valid: NDArray[np.bool_], labels: NDArray[np.int64], iou_threshold: float, limit: int
) -> NDArray[np.bool_]:
    """Which of the boxes (S, B, 4), in each segment best first, stay: (S, B)."""
    stays = np.zeros_like(valid)
    for segment, place in np.argwhere(valid):
        kept = np.flatnonzero(stays[segment])
        rivals = boxes[segment, kept[labels[segment, kept] == labels[segment, place]]]
        suppressed = any(float(iou(rival, boxes[segment, place])) > iou_threshold for rival in rivals)
        stays[segment, place] = not suppressed and len(kept) < limit
    return stays

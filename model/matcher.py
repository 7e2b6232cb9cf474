"""Which ground truth box an anchor or a proposal is trained towards (Faster R-CNN section 3.1.2).

Boxes and padded ground truth of a batch enter; an index and a label for each box leave. The rules are torchvision's.
"""

# N images, B anchors or proposals of an image, G places for ground truth, C for crowd regions; n images and g places
# at a time.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model import boxes as box_math
from model.kernels import run_kernels_on

POSITIVE, NEGATIVE, NEITHER = 1, 0, -1
"""A box that learns an object, one that learns background, and one that is not trained on."""

_CHUNK_PAIRS = {"cpu": 2**22, "cuda": 2**26}
"""Overlaps computed at once. 16 MB of float32 stay in a processor's cache: of an image's 268,569 anchors with 15 ground
truth boxes, or of the 2,000 proposals of 20 images with 100 each. A GPU has the memory, and a launch costs more."""


class Matches(NamedTuple):
    """What each box of a batch is trained towards."""

    gt_index: Tensor
    """(N, B) int64 place of the ground truth box; 0 for a box that is not positive."""
    label: Tensor
    """(N, B) int8 POSITIVE, NEGATIVE or NEITHER."""


@torch.no_grad()
def match(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    allow_low_quality: bool,
) -> Matches:
    """Match `boxes`, (N, B, 4) or (B, 4) shared by all images, to the filled places of `gt_boxes` (N, G, 4).

    A box is positive from `positive_iou` on and negative below `negative_iou`. `allow_low_quality` also makes positive
    every box that no other exceeds in IoU with some ground truth box; it is matched to its own best, which may be
    another, and a ground truth box that none touches so wins all those that do not touch it, as in torchvision. A
    ground truth box without area, which torchvision refuses, counts as not there.
    """
    if negative_iou > positive_iou:
        raise ValueError(f"negative_iou must be at most positive_iou {positive_iou}, got {negative_iou}")
    if run_kernels_on(boxes.device) and boxes.dtype == gt_boxes.dtype == torch.float32:
        from model.kernels.match import match_boxes

        return Matches(
            *match_boxes(
                boxes,
                gt_boxes,
                gt_valid,
                positive_iou=positive_iou,
                negative_iou=negative_iou,
                allow_low_quality=allow_low_quality,
            )
        )
    boxes = boxes.expand(len(gt_boxes), *boxes.shape[-2:])  # (N, B, 4)
    best = box_math.full_precision(boxes).new_full(boxes.shape[:2], -1.0)  # (N, B), below every overlap
    gt_index = torch.zeros_like(best, dtype=torch.int64)
    positive = torch.zeros_like(best, dtype=torch.bool)
    for images, places in _chunks(best, gt_valid.shape[1]):
        some = box_math.full_precision(gt_boxes[images, places])  # (n, g, 4)
        absent = ~(gt_valid[images, places] & (box_math.area(some) > 0))[..., None]  # (n, g, 1)
        overlap = box_math.iou(some, boxes[images]).masked_fill_(absent, -1.0)  # (n, g, B)
        if allow_low_quality:
            most = overlap.amax(dim=2, keepdim=True).masked_fill_(absent, 2.0)  # (n, g, 1), 2 is never met
            positive[images] |= (overlap == most).any(dim=1)
        some_best, some_index = overlap.max(dim=1)  # (n, B)
        better = some_best > best[images]  # of equal ones the first stays
        best[images] = some_best.where(better, best[images])
        gt_index[images] = (some_index + places.start).where(better, gt_index[images])
    positive |= best >= positive_iou
    label = torch.full_like(best, NEGATIVE, dtype=torch.int8)
    label.masked_fill_(best >= negative_iou, NEITHER).masked_fill_(positive, POSITIVE)
    return Matches(gt_index.where(positive, 0), label)


@torch.no_grad()
def ignore_crowd(label: Tensor, boxes: Tensor, crowd_boxes: Tensor, crowd_valid: Tensor, *, threshold: float) -> Tensor:
    """(N, B) labels where a negative that lies in a crowd region for at least `threshold` of its own area is NEITHER.

    The measure is COCO's for crowds, intersection over the area of the box, not over the union: a small box inside a
    large crowd may be one of its members. Positives stay, and `crowd_boxes` (N, C, 4) are not among the ground truth.
    """
    boxes = boxes.expand(len(crowd_boxes), *boxes.shape[-2:])  # (N, B, 4)
    label = label.clone()
    for images, places in _chunks(label, crowd_valid.shape[1]):
        own_area = box_math.area(box_math.full_precision(boxes[images]))[:, None]  # (n, 1, B)
        shared = box_math.intersection(crowd_boxes[images, places], boxes[images])  # (n, g, B)
        inside = shared / own_area.clamp(min=torch.finfo(shared.dtype).tiny) >= threshold
        crowded = (inside & crowd_valid[images, places, None]).any(dim=1)  # (n, B)
        label[images] = label[images].masked_fill((label[images] == NEGATIVE) & crowded, NEITHER)
    return label


def take(values: Tensor, index: Tensor) -> Tensor:
    """(N, B, ...) of each image's `values` (N, G, ...) those at `index` (N, B); zeros if there are no places."""
    if values.shape[1] == 0:
        return values.new_zeros(*index.shape, *values.shape[2:])
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _chunks(of_boxes: Tensor, num_places: int) -> list[tuple[slice, slice]]:
    """Images and places in parts of about _CHUNK_PAIRS overlaps with boxes (N, B), one image and place at the least."""
    num_images, num_boxes = of_boxes.shape
    pairs = _CHUNK_PAIRS[of_boxes.device.type]
    if num_boxes == 0:
        return []
    places = min(max(1, pairs // num_boxes), max(1, num_places))
    images = max(1, pairs // (num_boxes * places))
    return [
        (slice(image, image + images), slice(place, place + places))
        for image in range(0, num_images, images)
        for place in range(0, num_places, places)
    ]

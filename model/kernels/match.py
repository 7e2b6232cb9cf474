"""Matching of boxes to ground truth on CUDA: no matrix of overlaps is written, nothing waits for the host.

Boxes and padded ground truth of a batch enter; an index and a label for each box leave, those of `model.matcher.match`.
Source: Faster R-CNN (Ren et al. 2015) section 3.1.2.
"""

# N images, B boxes of an image, G places for ground truth, P boxes of one program.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""P: eight for each thread of a warp."""

NUM_WARPS = 1
"""One warp finds the largest of its overlaps without waiting for others, once for each ground truth box."""

_BLOCK = tl.constexpr(BLOCK)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    allow_low_quality: bool,
) -> tuple[Tensor, Tensor]:
    """(N, B) int64 places of the ground truth and (N, B) int8 labels; of finite boxes bit for bit those of
    `model.matcher.match`.

    `boxes` are float32 (N, B, 4), or (B, 4) shared by all images, `gt_boxes` float32 (N, G, 4), `gt_valid` (N, G). Both
    bounds are rounded to float32, as torch rounds what it compares float32 with.
    """
    num_images, num_places = gt_valid.shape
    if boxes.dtype != torch.float32 or gt_boxes.dtype != torch.float32:
        raise ValueError(f"boxes and gt_boxes must be float32, got {boxes.dtype} and {gt_boxes.dtype}")
    if gt_boxes.shape != (num_images, num_places, 4):
        raise ValueError(f"gt_boxes must be {(num_images, num_places, 4)} like gt_valid, got {tuple(gt_boxes.shape)}")
    boxes = boxes.contiguous().expand(num_images, *boxes.shape[-2:])  # (N, B, 4)
    num_boxes = boxes.shape[1]
    gt_index = torch.empty(num_images, num_boxes, dtype=torch.int64, device=boxes.device)
    label = torch.empty_like(gt_index, dtype=torch.int8)
    if label.numel() == 0:
        return gt_index, label
    inputs = (boxes, gt_boxes.contiguous(), gt_valid.contiguous())
    sizes = (boxes.stride(0), num_boxes, num_places)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}  # torch rounds after each step
    grid = (triton.cdiv(num_boxes, BLOCK), num_images)
    most = None
    if allow_low_quality and num_places > 0:
        most = torch.zeros(num_images, num_places, dtype=torch.int32, device=boxes.device)
        find_most[grid](*inputs, most, *sizes, **options)
    choose[grid](*inputs, most, gt_index, label, *sizes, positive_iou, negative_iou, **options)
    return gt_index, label


@triton.jit(do_not_specialize=["image_stride", "num_boxes", "num_places"])
def find_most(boxes, gt_boxes, gt_valid, most, image_stride, num_boxes, num_places):  # type: ignore[no-untyped-def]
    """Raise `most` (N, G), zeros at first, to the largest overlap of each place: the bits of floats that are not
    negative order as integers do."""
    image = tl.program_id(1).to(tl.int64)
    box = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)  # (P,)
    x1, y1, x2, y2 = _load(boxes + image * image_stride + box * 4, box < num_boxes)  # (P,) each
    place = image * num_places
    end = place + num_places
    while place < end:  # no range, as in `nms.sweep`
        u1, v1, u2, v2 = _load(gt_boxes + place * 4, True)
        if (tl.load(gt_valid + place) != 0) & ((u2 - u1) * (v2 - v1) > 0):
            largest = tl.max(_overlap(x1, y1, x2, y2, u1, v1, u2, v2), axis=0)
            tl.atomic_max(most + place, largest.to(tl.int32, bitcast=True), mask=largest > 0, sem="relaxed")
        place += 1


@triton.jit(do_not_specialize=["image_stride", "num_boxes", "num_places"])
def choose(  # type: ignore[no-untyped-def]
    boxes, gt_boxes, gt_valid, most, gt_index, label, image_stride, num_boxes, num_places, positive_iou, negative_iou
):
    """Write `gt_index` and `label` (N, B); with `most` (N, G) a box that reaches one of it is positive."""
    image = tl.program_id(1).to(tl.int64)
    box = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)  # (P,)
    there = box < num_boxes
    x1, y1, x2, y2 = _load(boxes + image * image_stride + box * 4, there)  # (P,) each
    best = tl.full((_BLOCK,), -1.0, tl.float32)  # below every overlap
    best_place = tl.zeros((_BLOCK,), tl.int32)
    positive = tl.zeros((_BLOCK,), tl.int1)
    first = image * num_places
    place = 0
    while place < num_places:
        u1, v1, u2, v2 = _load(gt_boxes + (first + place) * 4, True)
        if (tl.load(gt_valid + first + place) != 0) & ((u2 - u1) * (v2 - v1) > 0):
            overlap = _overlap(x1, y1, x2, y2, u1, v1, u2, v2)
            if most is not None:
                positive |= overlap == tl.load(most + first + place).to(tl.float32, bitcast=True)
            best_place = tl.where(overlap > best, place, best_place)  # of equal ones the first stays
            best = tl.maximum(best, overlap)
        place += 1
    positive |= best >= positive_iou
    out = image * num_boxes + box
    tl.store(gt_index + out, tl.where(positive, best_place, 0).to(tl.int64), mask=there)
    # POSITIVE, NEITHER and NEGATIVE of model.matcher
    tl.store(label + out, tl.where(positive, 1, tl.where(best >= negative_iou, -1, 0)).to(tl.int8), mask=there)


@triton.jit
def _load(boxes, there):  # type: ignore[no-untyped-def]
    x1 = tl.load(boxes, mask=there, other=0.0)
    y1 = tl.load(boxes + 1, mask=there, other=0.0)
    x2 = tl.load(boxes + 2, mask=there, other=0.0)
    y2 = tl.load(boxes + 3, mask=there, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _overlap(x1, y1, x2, y2, u1, v1, u2, v2):  # type: ignore[no-untyped-def]
    """(P,) the IoU of boxes (P,) with one other, each step as in `model.boxes.iou`."""
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
    shared = width * height
    union = (u2 - u1) * (v2 - v1) + (x2 - x1) * (y2 - y1) - shared
    return tl.div_rn(shared, tl.maximum(union, _TINY))

"""Non-maximum suppression of sorted segments on CUDA: one program sweeps a segment, nothing waits for the host.

In: boxes at fixed places, best first, and which places are filled. Out: which of them stay.
Source: Faster R-CNN (Ren et al. 2015) section 3.3; IoU and comparison as in torchvision.ops.nms.
"""

# S segments, B places in each, P places of one block.

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""P: as many places as an int64 has bits."""

NUM_WARPS = 16
"""A thread divides for its pairs one after the other: few pairs (8) and many warps hide how long each takes."""


def sorted_nms(
    boxes: Tensor, valid: Tensor, iou_threshold: float, *, labels: Tensor | None = None, limit: int | None = None
) -> Tensor:
    """Which boxes of S segments of B places stay: (S, B) bool.

    A filled place goes if an earlier kept one of its segment overlaps it by more than ``iou_threshold``.

    Args:
        boxes: float32 (S, B, 4), in each segment best first; what lies at places that are not filled is never read.
        valid: bool (S, B), which places are filled.
        iou_threshold: from 0 on.
        labels: integers (S, B); where given, only boxes of equal label suppress each other.
        limit: at most so many are kept in a segment, the first ones.
    """
    num_segments, num_places = valid.shape
    if boxes.dtype != torch.float32 or boxes.shape != (num_segments, num_places, 4):
        raise ValueError(f"boxes must be float32 {(*valid.shape, 4)}, got {boxes.dtype} {tuple(boxes.shape)}")
    if labels is not None and labels.shape != valid.shape:
        raise ValueError(f"labels must be {tuple(valid.shape)} like valid, got {tuple(labels.shape)}")
    if not iou_threshold >= 0:
        raise ValueError(f"iou_threshold must be at least 0, got {iou_threshold}")
    kept = torch.zeros_like(valid, memory_format=torch.contiguous_format)  # (S, B)
    if valid.numel() == 0:
        return kept
    sweep[(num_segments,)](
        boxes.contiguous(),
        valid.contiguous(),
        None if labels is None else labels.contiguous(),
        kept,
        torch.empty(kept.shape, dtype=torch.int32, device=kept.device),
        num_places,
        num_places if limit is None else limit,
        _float32_at_most(iou_threshold),
        PLACES=triton.next_power_of_2(num_places),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # torchvision rounds after each step
    )
    return kept


def _float32_at_most(value: float) -> float:
    """The largest float32 up to a double: a float32 exceeds one just if it exceeds the other."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf)))


# Sizes are not compiled in: one kernel serves every number of places up to a power of two, and every limit.
@triton.jit(do_not_specialize=["num_places", "limit"])  # type: ignore[untyped-decorator]
def sweep(
    boxes: tl.tensor,
    valid: tl.tensor,
    labels: tl.tensor | None,
    kept: tl.tensor,
    listed: tl.tensor,
    num_places: tl.tensor,
    limit: tl.tensor,
    threshold: tl.tensor,
    PLACES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Sweep the segment of this program, P places at a time, and set ``kept`` (S, B) where a box stays.

    Only what is kept suppresses, so a block is compared with the boxes kept before, whose places are ``listed`` (S, B)
    as they are found, and with itself: at most B (kept + P) pairs. A matrix of the overlaps of all pairs, swept by a
    second kernel, takes B² / 2: twelve times as many for 100 kept of 4096, and as many where all of 1000 are kept.
    """
    segment = tl.program_id(0).to(tl.int64) * num_places
    boxes += segment * 4
    valid += segment
    kept += segment
    listed += segment
    if labels is not None:
        labels += segment
    in_block = tl.arange(0, BLOCK)  # (P,)
    bits = tl.full((BLOCK,), 1, tl.int64) << in_block  # (P,)
    end = _end(valid, num_places, PLACES)
    start = 0
    num_kept = 0
    while (start < end) & (num_kept < limit):
        places = start + in_block  # (P,)
        filled = tl.load(valid + places, mask=places < end, other=0) != 0  # (P,)
        hits = tl.zeros((BLOCK, BLOCK), tl.int32)  # a kept box suppresses one of the block
        first = 0
        while first < num_kept:  # a range to a tensor fails where Triton 3.6 interprets with NumPy 2.4
            ranks = first + in_block  # (P,)
            is_listed = ranks < num_kept
            earlier = tl.load(listed + ranks, mask=is_listed, other=0)  # (P,)
            overlaps = _overlaps(boxes, labels, earlier, is_listed, places, filled, threshold)
            hits = tl.where(overlaps, 1, hits)
            first += BLOCK
        open_places = filled & (tl.max(hits, axis=0) == 0)  # (P,)
        overlaps = _overlaps(boxes, labels, places, filled, places, filled, threshold)
        overlaps &= in_block[:, None] < in_block[None, :]
        suppressors = tl.sum(tl.where(overlaps, bits[:, None], 0), axis=0)  # (P,) a bit for each box of the block
        stays = _resolve(open_places, suppressors, bits)  # (P,)
        ranks = num_kept + tl.cumsum(stays.to(tl.int32), axis=0) - 1  # (P,)
        stays &= ranks < limit
        tl.store(kept + places, stays, mask=filled)
        tl.store(listed + ranks, places, mask=stays)
        tl.debug_barrier()  # other threads of the program than those that list a place read it
        num_kept += tl.sum(stays.to(tl.int32), axis=0)
        start += BLOCK


@triton.jit  # type: ignore[untyped-decorator]
def _end(valid: tl.tensor, num_places: tl.tensor, PLACES: tl.constexpr) -> tl.tensor:  # noqa: N803
    """The place after the last one filled."""
    places = tl.arange(0, PLACES)  # (B,) up to a power of two
    filled = tl.load(valid + places, mask=places < num_places, other=0) != 0
    return tl.max(tl.where(filled, places + 1, 0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _overlaps(
    boxes: tl.tensor,
    labels: tl.tensor | None,
    first: tl.tensor,
    first_filled: tl.tensor,
    second: tl.tensor,
    second_filled: tl.tensor,
    threshold: tl.tensor,
) -> tl.tensor:
    """Whether each of the boxes at places ``first`` (P,) overlaps each at ``second`` (P,) too much: (P, P).

    A place not filled is read as four zeros, a box that meets nothing.
    """
    first, first_filled = first[:, None], first_filled[:, None]  # (P, 1)
    second, second_filled = second[None, :], second_filled[None, :]  # (1, P)
    x1, y1, x2, y2 = _load_boxes(boxes, first, first_filled)  # (P, 1) each
    u1, v1, u2, v2 = _load_boxes(boxes, second, second_filled)  # (1, P) each
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)  # (P, P)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)  # (P, P)
    intersection = width * height
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection
    # An intersection of zero exceeds no threshold, and 0 / 0 suppresses nothing: neither needs its quotient.
    meets = intersection > 0
    iou = tl.div_rn(tl.where(meets, intersection, 1.0), tl.where(meets, union, 1.0))
    overlaps = meets & (iou > threshold)
    if labels is not None:
        first_labels = tl.load(labels + first, mask=first_filled, other=0)  # (P, 1)
        second_labels = tl.load(labels + second, mask=second_filled, other=0)  # (1, P)
        overlaps &= first_labels == second_labels
    return overlaps


@triton.jit  # type: ignore[untyped-decorator]
def _load_boxes(
    boxes: tl.tensor, places: tl.tensor, filled: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    boxes += places * 4
    x1 = tl.load(boxes, mask=filled, other=0.0)
    y1 = tl.load(boxes + 1, mask=filled, other=0.0)
    x2 = tl.load(boxes + 2, mask=filled, other=0.0)
    y2 = tl.load(boxes + 3, mask=filled, other=0.0)
    return x1, y1, x2, y2


@triton.jit  # type: ignore[untyped-decorator]
def _resolve(open_places: tl.tensor, suppressors: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """Which open boxes (P,) of a block stay, where each goes if one of its suppressors, all before it, stays.

    From a guess that all stay, the first box is right at once and each round puts one more right at least, so that what
    no longer changes is the answer. It takes as many rounds as suppressions follow from each other, mostly a few.
    """
    staying = tl.sum(tl.where(open_places, bits, 0), axis=0)
    before = ~staying
    while staying != before:
        before = staying
        staying = tl.sum(tl.where(open_places & ((suppressors & staying) == 0), bits, 0), axis=0)
    return (bits & staying) != 0

"""RoIAlign over the levels of a feature pyramid, for all images of a batch at once.

In: channels-last maps of every level, boxes in the input frame, the image each box lies in.
Out: one fixed-size map per box. Source: Mask R-CNN (He et al. 2017) section 3; the choice of level: FPN
(Lin et al. 2017) eq. 1.

A bin is the mean of ``sampling_ratio²`` bilinear samples, so it is a weighted sum of ``4·sampling_ratio²`` pixels, each
a row of the channels-last map: that is what ``embedding_bag`` computes, and on a CPU it runs at the speed of memory.
"""

# N images, C channels, R boxes, S output side, T samples along one side of a bin.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from model.boxes import full_precision
from model.kernels import run_kernels_on

CANONICAL_SCALE = 224.0
"""FPN eq. 1: a box of 224 px, the side of an ImageNet crop, maps to …"""
CANONICAL_LEVEL = 4
"""… level 4, whose stride is 2⁴."""

_OUTSIDE = -1e6
"""All four edges of a box that is not finite: it pools zeros, where torchvision's kernel would read any address."""

_CHUNK_BINS = 4_096
"""Bins computed at once: few enough that they are still in the cache when they are put in their place."""


class _Sampling(NamedTuple):
    scale: float
    output_size: int
    ratio: int
    aligned: bool
    windows: tuple[int, int] | None = None
    """Samples of a bin along its rows and columns, where they adapt to the box."""


def assign_levels(
    boxes: Tensor,
    num_levels: int,
    *,
    first_level: int = 2,
    rounding: Literal["torchvision", "detectron2"] = "torchvision",
) -> Tensor:
    """Index in ``0..num_levels-1`` of the level each box of (R, 4) is pooled from; level k has stride 2ᵏ.

    ``rounding`` is the recipe's ``roi_levels``: what keeps a box on the border between two levels from the lower one.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    ratio = area.clamp(min=0).sqrt() / CANONICAL_SCALE
    if rounding == "torchvision":
        level = torch.floor(CANONICAL_LEVEL + torch.log2(ratio) + 1e-6)
    else:
        level = torch.floor(CANONICAL_LEVEL + torch.log2(ratio + 1e-8))
    return (level.clamp(first_level, first_level + num_levels - 1) - first_level).to(torch.int64)  # (R,)


def multilevel_roi_align(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_index: Tensor,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    rounding: Literal["torchvision", "detectron2"] = "torchvision",
) -> Tensor:
    """Pool each box from its own level: (R, C, S, S), channels-last, in the dtype of the features.

    ``features`` are (N, C, Hl, Wl) and best kept channels-last. ``sampling_ratio`` 0 takes as many samples as a bin has
    pixels. ``aligned`` shifts by half a pixel and drops the rule that a box is at least one pixel wide.
    """
    if len(features) != len(strides):
        raise ValueError(f"features and strides must be as many, got {len(features)} and {len(strides)}")
    in_order = torch.are_deterministic_algorithms_enabled()  # the kernel's gradients are added in any order
    if run_kernels_on(features[0].device) and len(features) <= 4 and not in_order:
        from model.kernels.roi_align import roi_align

        return roi_align(
            features,
            strides,
            boxes,
            image_index,
            assign_levels(boxes, len(features), first_level=int(math.log2(strides[0])), rounding=rounding),
            output_size=output_size,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )
    num_channels = features[0].shape[1]
    boxes = boxes.where(boxes.isfinite().all(dim=1, keepdim=True), _OUTSIDE)
    level_index = assign_levels(boxes, len(features), first_level=int(math.log2(strides[0])), rounding=rounding)
    pooled = features[0].new_empty((len(boxes), output_size, output_size, num_channels))
    pool = _operator_for(features, sampling_ratio)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        chosen = torch.nonzero(level_index == level).flatten()
        rois = torch.cat([image_index[chosen, None].to(boxes.dtype), boxes[chosen]], dim=1)
        pool(feature, rois, _Sampling(1.0 / stride, output_size, sampling_ratio, aligned), pooled, chosen)
    return pooled.permute(0, 3, 1, 2)  # (R, C, S, S)


def _operator_for(features: Sequence[Tensor], sampling_ratio: int) -> Callable[..., None]:
    feature = features[0]
    if feature.device.type != "cpu" or feature.dtype not in {torch.float64, torch.float32, torch.bfloat16}:
        return _pool_by_torchvision
    if sampling_ratio > 0:
        return _pool_by_bags
    # Each group of boxes is put in its place by itself, and for a gradient each of those would copy all of it.
    return _pool_by_torchvision if torch.is_grad_enabled() and feature.requires_grad else _pool_adaptively


def _pool_by_torchvision(feature: Tensor, rois: Tensor, sampling: _Sampling, pooled: Tensor, place: Tensor) -> None:
    # torchvision has no bfloat16 kernel, and a half-precision box would move by pixels.
    precise = full_precision(feature)
    maps = torchvision_roi_align(
        precise, rois.to(precise), sampling.output_size, sampling.scale, sampling.ratio, sampling.aligned
    )
    pooled[place] = maps.permute(0, 2, 3, 1).to(pooled.dtype)  # (R, S, S, C)


def _pool_adaptively(feature: Tensor, rois: Tensor, sampling: _Sampling, pooled: Tensor, place: Tensor) -> None:
    """By bags, the boxes together that take as many samples."""
    feature = feature.contiguous(memory_format=torch.channels_last)  # once, and not for each group
    spans = [_span(rois[:, axis], rois[:, axis + 2], sampling)[1] for axis in (2, 1)]
    counts = torch.stack([(span / sampling.output_size).ceil() for span in spans], dim=1).to(torch.int64)  # (R, 2)
    pairs, group = torch.unique(counts, dim=0, return_inverse=True)
    for index, (rows, columns) in enumerate(pairs.tolist()):
        here = torch.nonzero(group == index).flatten()
        if rows > 0 and columns > 0:
            adapted = sampling._replace(windows=(rows, columns))
            _pool_by_bags(feature, rois[here], adapted, pooled, place[here])
        else:
            pooled[place[here]] = 0


def _pool_by_bags(feature: Tensor, rois: Tensor, sampling: _Sampling, pooled: Tensor, place: Tensor) -> None:
    num_channels, height, width = feature.shape[1:]
    table = feature.permute(0, 2, 3, 1).reshape(-1, num_channels).contiguous()  # (N H W, C), a view if channels-last
    first = rois[:, 0].to(torch.int32) * (height * width)
    if sampling.windows is None:
        rows, row_weights = _axis_samples(rois[:, 2], rois[:, 4], sampling, height)
        columns, column_weights = _axis_samples(rois[:, 1], rois[:, 3], sampling, width)
    else:
        rows, row_weights = _axis_window(rois[:, 2], rois[:, 4], sampling, height, sampling.windows[0])
        columns, column_weights = _axis_window(rois[:, 1], rois[:, 3], sampling, width, sampling.windows[1])
    rows = rows * width + first[:, None, None]
    num_rows, num_columns = rows.shape[2], columns.shape[2]
    trains = torch.is_grad_enabled() and feature.requires_grad
    step = max(1, len(rois) if trains else _CHUNK_BINS // sampling.output_size**2)
    for start in range(0, max(1, len(rois)), step):  # one even without boxes: gradients must reach each level
        part = slice(start, start + step)
        # (R, S, 1, B) with (R, 1, S, B): the bag of B pixels last and contiguous, which the addition is fast on.
        index = rows[part].repeat_interleave(num_columns, 2)[:, :, None] + columns[part].repeat(1, 1, num_rows)[:, None]
        weight = (
            row_weights[part].repeat_interleave(num_columns, 2)[:, :, None]
            * column_weights[part].repeat(1, 1, num_rows)[:, None]
        )
        bag_size = num_rows * num_columns
        bags = _Bags.apply(table, index.view(-1, bag_size), weight.view(-1, bag_size))  # (R * S * S, C)
        maps = bags.view(-1, *pooled.shape[1:])  # (R, S, S, C)
        if maps.requires_grad:
            pooled[place[part]] = maps
        else:
            _as_words(pooled)[place[part]] = _as_words(maps)


class _Bags(torch.autograd.Function):
    """Weighted sums of rows: a sparse matrix of as many weights in each row, times the table.

    The gradient is its transpose times the sums'. embedding_bag's own sorts the rows first, and takes five times as
    long (measured: 50,000 bags of 16 rows of 96 channels, 0.39 s and 0.08 s on two cores).
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """(B, C) of a table (P, C), from index and weight (B, W)."""
        ctx.save_for_backward(index, weight)
        ctx.num_rows, ctx.dtype = len(table), table.dtype
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight.to(table))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        bag = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])
        places = torch.stack([index.flatten().to(torch.int64), bag])  # (2, B W) row of the table, bag
        shape = (ctx.num_rows, len(index))
        gradient = full_precision(gradient)
        transposed = torch.sparse_coo_tensor(places, weight.flatten().to(gradient), shape, check_invariants=False)
        return torch.sparse.mm(transposed, gradient).to(ctx.dtype), None, None


def _as_words(maps: Tensor) -> Tensor:
    """The same memory in pieces of 8 bytes where they fit: fewer to put in their place."""
    return maps.view(torch.int64) if maps.shape[-1] * maps.element_size() % 8 == 0 else maps


def _axis_samples(low: Tensor, high: Tensor, sampling: _Sampling, size: int) -> tuple[Tensor, Tensor]:
    """Pixels and weights along one axis: (R, S, 2 T) int32 and float32, torchvision's rules step by step."""
    before, after, fraction, share = _bilinear(low, high, sampling, size, sampling.ratio)
    pixel = torch.stack([before, after], dim=3)  # (R, S, T, 2)
    weight = torch.stack([1 - fraction, fraction], dim=3) * share[..., None]
    return pixel.flatten(2).to(torch.int32), weight.flatten(2)


def _axis_window(low: Tensor, high: Tensor, sampling: _Sampling, size: int, count: int) -> tuple[Tensor, Tensor]:
    """The same with T = `count` samples that are at most a pixel apart: the T + 1 pixels in a row that they can touch,
    each once."""
    before, after, fraction, share = _bilinear(low, high, sampling, size, count)
    first = before[..., :1]  # (R, S, 1)
    weight = torch.zeros(*before.shape[:2], count + 1, dtype=fraction.dtype)
    weight.scatter_add_(2, (before - first).to(torch.int64), (1 - fraction) * share)
    # A rounding may put the last sample on the pixel behind: its fraction is 0 then.
    weight.scatter_add_(2, (after - first).clamp(max=count).to(torch.int64), fraction * share)
    pixel = (first + torch.arange(count + 1)).clamp(max=size - 1)
    return pixel.to(torch.int32), weight


def _bilinear(low: Tensor, high: Tensor, sampling: _Sampling, size: int, count: int) -> tuple[Tensor, ...]:
    """Of T = `count` samples of each bin, (R, S, T) each: the pixels before and after it, how far it is from the first,
    and the sample's share in the bin."""
    start, length = _span(low, high, sampling)
    bin_size = (length / sampling.output_size)[:, None, None]
    bins = torch.arange(sampling.output_size, dtype=low.dtype, device=low.device)[:, None]
    samples = torch.arange(count, dtype=low.dtype, device=low.device) + 0.5
    position = start[:, None, None] + bins * bin_size + samples * bin_size / count  # (R, S, T)
    inside = (position >= -1.0) & (position <= size)
    position = position.clamp(0, size - 1)
    before = position.floor()
    return before, (before + 1).clamp(max=size - 1), position - before, inside / count


def _span(low: Tensor, high: Tensor, sampling: _Sampling) -> tuple[Tensor, Tensor]:
    """(R,) where the boxes begin along one axis and how long they are, in pixels of the level."""
    offset = 0.5 if sampling.aligned else 0.0
    start = low * sampling.scale - offset
    length = high * sampling.scale - offset - start
    return start, length if sampling.aligned else length.clamp(min=1.0)

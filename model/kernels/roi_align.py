"""RoIAlign on CUDA: all levels and all images of a batch in one launch, and its gradient in another.

In: channels-last maps of up to four levels, boxes in the input frame, the image and the level of each box.
Out: one fixed-size map per box, as `model.roi_align.multilevel_roi_align` pools it.
Source: Mask R-CNN (He et al. 2017) section 3; the rules at the borders are torchvision's.
"""

# N images, C channels, R boxes, L levels, S output side, T samples along one side of a bin.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.roi_bins import add_gradients, pool_rows

MAX_LEVELS = 4
"""Each level is an argument of the kernels."""

_MAX_CHANNELS = 256
"""Channels of one program: 16 bytes of bfloat16 for each thread of a warp."""

_MAX_GRADIENTS = 2_048
"""Numbers of a row of bins that one program holds: 64 registers of each thread of a warp."""

_ROW_GROUPS = 8
"""Programs that share the rows of pixels of one box: a box reaches 14 to 28 rows of its level, unless it is small."""

_ADAPTIVE_ROWS = 4
"""Rows of pixels read together where T is known only on the device."""


class _Sampling(NamedTuple):
    strides: Sequence[int]
    output_size: int
    ratio: int
    aligned: bool


def roi_align(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_index: Tensor,
    level_index: Tensor,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool each box from its own level, all levels and images in one launch: (R, C, S, S), channels-last memory, in
    the dtype of the features.

    Differentiable by the features; in the gradients the order of additions, and so the last bit, is not fixed.

    Args:
        features: one to four (N, C, Hl, Wl) of one floating dtype; copied where they are not channels-last.
        strides: pixels of the input frame per pixel of each level.
        boxes: float32 (R, 4) in the input frame; one that is not finite pools zeros.
        image_index: int64 (R,) in ``0..N-1``.
        level_index: int64 (R,) in ``0..L-1``, as `model.roi_align.assign_levels` gives it.
        output_size: S.
        sampling_ratio: T, or 0 for as many samples as a bin has pixels. With 0 a box costs what its area does, outside
            the map too, so clip boxes before.
        aligned: shifts by half a pixel and drops the rule that a box is at least one pixel wide.
    """
    if len(features) != len(strides):
        raise ValueError(f"features and strides must be as many, got {len(features)} and {len(strides)}")
    if not 1 <= len(features) <= MAX_LEVELS:
        raise ValueError(f"levels must be 1 to {MAX_LEVELS}, got {len(features)}")
    sampling = _Sampling(strides, output_size, sampling_ratio, aligned)
    regions = (boxes.to(torch.float32).contiguous(), image_index.contiguous(), level_index.contiguous())
    if torch.is_grad_enabled() and any(feature.requires_grad for feature in features):
        pooled: Tensor = _RoIAlign.apply(sampling, _shared_by(features), *regions, *features)
        return pooled
    return _pool(features, regions, sampling)


def share_gradients(features: Sequence[Tensor]) -> list[Tensor]:
    """The same maps. However often regions are pooled from all of them, their gradients are added up in one place, and
    rounded and joined with those of other uses once; by themselves each is a pass over the maps in float32. What
    is complete are those of `features`, not those of the maps returned."""
    return list(_Shared.apply(*features))


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.dtype, ctx.num_levels = None, features[0].dtype, len(features)
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, ctx.sums = ctx.sums, None
        if sums is None:
            return gradients
        return tuple(
            total.to(ctx.dtype) if other is None else torch.add(total, other, out=torch.empty_like(other))
            for total, other in zip(sums, gradients, strict=True)
        )


def _shared_by(features: Sequence[Tensor]) -> Any:
    """The node of `share_gradients` that all of its maps, and no others, have come from."""
    node: Any = features[0].grad_fn
    is_shared = type(node) is _Shared._backward_cls
    same = all(feature.grad_fn is node and feature.output_nr == index for index, feature in enumerate(features))
    return node if is_shared and same and node.num_levels == len(features) else None


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sampling: _Sampling,
        shared: Any,
        boxes: Tensor,
        image_index: Tensor,
        level_index: Tensor,
        *features: Tensor,
    ) -> Tensor:
        regions = (boxes, image_index, level_index)
        ctx.save_for_backward(*regions)
        ctx.sampling, ctx.shared = sampling, shared
        ctx.shapes, ctx.dtype = [feature.shape for feature in features], features[0].dtype
        return _pool(features, regions, sampling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        before = None if ctx.shared is None else ctx.shared.sums
        sums = _zeros(ctx.shapes, gradient) if before is None else before
        _add_gradients(sums, gradient, ctx.saved_tensors, ctx.sampling)
        if ctx.shared is None:
            return (None, None, None, None, None, *(each.to(ctx.dtype) for each in sums))
        ctx.shared.sums = sums
        return (None,) * (5 + len(sums))


def _pool(features: Sequence[Tensor], regions: Sequence[Tensor], sampling: _Sampling) -> Tensor:
    features = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
    num_boxes, num_channels, size = len(regions[0]), features[0].shape[1], sampling.output_size
    pooled = features[0].new_empty((num_boxes, size, size, num_channels))
    block = min(_MAX_CHANNELS, triton.next_power_of_2(num_channels))
    if pooled.numel() > 0:
        with torch.cuda.device_of(pooled):  # type: ignore[no-untyped-call]
            pool_rows[(num_boxes * size, triton.cdiv(num_channels, block))](
                *_padded(features),
                *regions,
                pooled,
                *_level_numbers([feature.shape for feature in features], sampling.strides),
                C=num_channels,
                S=size,
                T=sampling.ratio,
                ALIGNED=sampling.aligned,
                ROWS=2 * triton.next_power_of_2(sampling.ratio) if sampling.ratio > 0 else _ADAPTIVE_ROWS,
                BLOCK=block,
                SUM=_sum_type(features[0].dtype),
                num_warps=1,
                enable_fp_fusion=True,  # said because the default changes between releases
            )
    return pooled.permute(0, 3, 1, 2)  # (R, C, S, S)


def _zeros(shapes: Sequence[torch.Size], gradient: Tensor) -> list[Tensor]:
    """(N, C, Hl, Wl) of each level, channels-last, in float32 or wider."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return [
        torch.zeros((num_images, height, width, channels), dtype=dtype, device=gradient.device).permute(0, 3, 1, 2)
        for num_images, channels, height, width in shapes
    ]


def _add_gradients(levels: Sequence[Tensor], gradient: Tensor, regions: Sequence[Tensor], sampling: _Sampling) -> None:
    """To those of each level (N, C, Hl, Wl) add what comes of the gradient (R, C, S, S)."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    num_boxes, num_channels, size = gradient.shape[:3]
    columns = triton.next_power_of_2(size)
    block = min(_MAX_CHANNELS, max(1, _MAX_GRADIENTS // columns), triton.next_power_of_2(num_channels))
    if gradient.numel() > 0:
        with torch.cuda.device_of(gradient):  # type: ignore[no-untyped-call]
            add_gradients[(num_boxes * _ROW_GROUPS, triton.cdiv(num_channels, block))](
                *_padded(levels),
                *regions,
                gradient,
                *_level_numbers([level.shape for level in levels], sampling.strides),
                C=num_channels,
                S=size,
                T=sampling.ratio,
                ALIGNED=sampling.aligned,
                GROUPS=_ROW_GROUPS,
                COLUMNS=columns,
                BLOCK=block,
                SUM=_sum_type(levels[0].dtype),
                num_warps=1,
                enable_fp_fusion=True,  # said because the default changes between releases
            )


def _padded(levels: Sequence[Any]) -> list[Any]:
    """As many as the kernels take; no box asks for one that is added."""
    return [*levels, *[levels[-1]] * (MAX_LEVELS - len(levels))]


def _level_numbers(shapes: Sequence[torch.Size], strides: Sequence[int]) -> list[float]:
    """Heights, then widths, then scales of the four levels."""
    heights, widths = [shape[2] for shape in shapes], [shape[3] for shape in shapes]
    return [*_padded(heights), *_padded(widths), *_padded([1.0 / stride for stride in strides])]


def _sum_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32

"""The pyramid's sum (Lin et al. 2017): to each cell of a map the nearest cell of a coarser one is added.

Maps are (N, C, H, W); the coarser ones (N, C, h, w).
"""

# N images, C channels.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_nearest(lateral: Tensor, coarser: Tensor) -> Tensor:
    """`lateral` itself, in its dtype, with the nearest cells of `coarser` added."""
    added: Tensor = _AddNearest.apply(lateral, coarser)
    return added


class _AddNearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lateral: Tensor, coarser: Tensor) -> Tensor:
        ctx.size, ctx.dtype = coarser.shape[2:], coarser.dtype
        ctx.mark_dirty(lateral)
        num_images, channels, height, width = coarser.shape
        if lateral.shape[2:] == (2 * height, 2 * width):  # so of every padded input: each cell is added to four
            cells = lateral.permute(0, 2, 3, 1).view(num_images, height, 2, width, 2, channels)
            cells.add_(coarser.permute(0, 2, 3, 1)[:, :, None, :, None])
            return lateral
        with nullcontext() if lateral.is_meta else torch.autocast(lateral.device.type, enabled=False):  # it would widen
            return lateral.add_(F.interpolate(coarser, size=lateral.shape[2:], mode="nearest"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, of_coarser(gradient, ctx.size).to(ctx.dtype)


def of_coarser(gradient: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, *size) the gradient of the coarser maps, from the sum's (N, C, H, W)."""
    height, width = size
    if gradient.shape[2:] == (height, width):
        return gradient
    if gradient.shape[2:] == (2 * height, 2 * width):
        return F.avg_pool2d(gradient, 2, divisor_override=1)  # on a CPU 50 times as fast as a sum over two axes
    shape = (*gradient.shape[:2], height, width)
    coarser: Tensor = torch.ops.aten.upsample_nearest2d_backward(gradient, gradient.shape[2:], shape)
    return coarser

"""Pillow's bilinear resize of grey levels to the last bit, in whole numbers, on any device.

detectron2's weights are trained and tested on images resized so, and torch's own antialiased resize is off by one grey
level here and there, which moves scores by more than 1e-4. Source: the algorithm of Pillow's Resample.c.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.structures import ImageSize

# H × W before, T pixels that one of the result is made from.

_BITS = 22
"""Weights are whole multiples of 2⁻²²: the sums of 8-bit levels stay within 31 bits."""


def pillow_resize(pixels: Tensor, size: ImageSize) -> Tensor:
    """(H, W, 3) uint8 brought to `size`, each row first and then each column, rounded to whole levels after both."""
    if pixels.shape[1] != size.width:
        pixels = _resize_axis(pixels, 1, size.width)
    if pixels.shape[0] != size.height:
        pixels = _resize_axis(pixels, 0, size.height)
    return pixels


def _resize_axis(pixels: Tensor, axis: int, length: int) -> Tensor:
    sources, weights = (values.to(pixels.device) for values in _sources(pixels.shape[axis], length))  # (length, T)
    shape = [1, 1, 1]
    shape[axis] = length
    half = 1 << (_BITS - 1)
    total = torch.full((), half, dtype=torch.int32, device=pixels.device)
    for source, weight in zip(sources.unbind(1), weights.unbind(1), strict=True):
        total = total + pixels.index_select(axis, source).int() * weight.view(shape)
    return (total >> _BITS).to(torch.uint8)


def _sources(before: int, after: int) -> tuple[Tensor, Tensor]:
    """(after, T) for each pixel of the result those it is made from, and what each counts in 2⁻²²."""
    scale = before / after
    reach = max(scale, 1.0)
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) * scale
    first = (centre - reach + 0.5).long().clamp(min=0)
    end = (centre + reach + 0.5).long().clamp(max=before)
    sources = first[:, None] + torch.arange(math.ceil(reach) * 2 + 1)  # (after, T)
    weights = (1 - ((sources - centre[:, None] + 0.5) * (1 / reach)).abs()).clamp(min=0)
    weights = weights * (sources < end[:, None])
    weights = weights / weights.sum(dim=1, keepdim=True)
    return sources.clamp(max=before - 1), (weights * (1 << _BITS) + 0.5).int()

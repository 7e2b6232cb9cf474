"""Box arithmetic, in float32 and in the order of operations of torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Boxes are (..., 4) x1 y1 x2 y2; sizes are (..., 2) height, width, and broadcast over the boxes.


def decode(deltas: Tensor, boxes: Tensor, *, weights: Sequence[float], max_log_scale: float) -> Tensor:
    """(..., 4) the boxes that `deltas` (dx, dy, dw, dh) make of `boxes`."""
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True))
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    center_x, center_y = dx * width + (x1 + 0.5 * width), dy * height + (y1 + 0.5 * height)
    half_width = 0.5 * (dw.clamp(max=max_log_scale).exp() * width)
    half_height = 0.5 * (dh.clamp(max=max_log_scale).exp() * height)
    decoded = (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)
    return torch.stack(decoded, dim=-1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes cut to the images they lie in."""
    return torch.minimum(boxes.clamp(min=0), _per_coordinate(sizes))


def scale(boxes: Tensor, ratios: Tensor) -> Tensor:
    """Boxes in a frame that is `ratios` (height, width) times as large."""
    return boxes * _per_coordinate(ratios)


def wide_enough(boxes: Tensor, min_side: float) -> Tensor:
    """(...) whether neither side is below `min_side`."""
    return (boxes[..., 2:] - boxes[..., :2] >= min_side).all(dim=-1)


def first_of_each_image(image_index: Tensor, *, num_images: int, limit: int) -> tuple[Tensor, Tensor]:
    """Positions of each image's first `limit` entries of a list, in the list's order.

    Returns (num_images, limit) positions in `image_index` and whether each is filled; empty places hold 0.
    """
    order = image_index.argsort(stable=True)
    image_index = image_index[order]
    counts = image_index.new_zeros(num_images).scatter_add_(0, image_index, torch.ones_like(image_index))
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[image_index]
    slot = image_index * (limit + 1) + rank.clamp(max=limit)  # the last column takes what is over and is cut off
    positions = order.new_zeros(num_images * (limit + 1)).scatter_(0, slot, order).view(num_images, limit + 1)
    filled = torch.arange(limit, device=order.device) < counts[:, None]  # (num_images, limit)
    return positions[:, :limit].where(filled, 0), filled


def _per_coordinate(sizes: Tensor) -> Tensor:
    return sizes.flip(-1).repeat((1,) * (sizes.dim() - 1) + (2,))  # (..., 4) width, height, width, height

"""Box arithmetic, in float32 and in the order of operations of torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def encode(boxes: Tensor, targets: Tensor, *, weights: Sequence[float]) -> Tensor:
    """(..., 4) the deltas of which `decode` makes `targets` again, from `boxes`."""
    x1, y1, x2, y2 = full_precision(boxes).unbind(-1)
    target_x1, target_y1, target_x2, target_y2 = full_precision(targets).unbind(-1)
    width, height = x2 - x1, y2 - y1
    target_width, target_height = target_x2 - target_x1, target_y2 - target_y1
    dx = weights[0] * ((target_x1 + 0.5 * target_width) - (x1 + 0.5 * width)) / width
    dy = weights[1] * ((target_y1 + 0.5 * target_height) - (y1 + 0.5 * height)) / height
    dw, dh = weights[2] * (target_width / width).log(), weights[3] * (target_height / height).log()
    return torch.stack((dx, dy, dw, dh), dim=-1)


def area(boxes: Tensor) -> Tensor:
    """(...) width times height."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides[..., 0] * sides[..., 1]


def intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """(..., A, B) the area each of `boxes` (..., A, 4) shares with each of `others` (..., B, 4)."""
    x1, y1, x2, y2 = full_precision(boxes)[..., :, None, :].unbind(-1)  # (..., A, 1)
    other_x1, other_y1, other_x2, other_y2 = full_precision(others)[..., None, :, :].unbind(-1)  # (..., 1, B)
    width = (torch.minimum(x2, other_x2) - torch.maximum(x1, other_x1)).clamp(min=0)
    height = (torch.minimum(y2, other_y2) - torch.maximum(y1, other_y1)).clamp(min=0)
    return width * height


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(..., A, B) intersection over union of each of `boxes` (..., A, 4) with each of `others` (..., B, 4); 0 for two
    boxes without area."""
    shared = intersection(boxes, others)
    union = area(full_precision(boxes))[..., :, None] + area(full_precision(others))[..., None, :] - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes cut to the images they lie in."""
    return torch.minimum(boxes.clamp(min=0), _per_coordinate(sizes))


def scale(boxes: Tensor, ratios: Tensor) -> Tensor:
    """Boxes in a frame that is `ratios` (height, width) times as large."""
    return boxes * _per_coordinate(ratios)


def wide_enough(boxes: Tensor, min_side: float) -> Tensor:
    """(...) whether neither side is below `min_side`."""
    return (boxes[..., 2:] - boxes[..., :2] >= min_side).all(dim=-1)


def padded(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(N, G, 4) the boxes of each image in as many places as the fullest needs, and (N, G) which are filled."""
    counts = torch.tensor([len(one) for one in boxes])
    places = pad_sequence(list(boxes), batch_first=True)  # (N, G, 4)
    return places, torch.arange(places.shape[1]) < counts[:, None]


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


class Places(NamedTuple):
    """S places for each row of a batch, the empty ones behind the others."""

    position: Tensor
    """(N, S) what is at the place; 0 for an empty one."""
    filled: Tensor
    """(N, S)."""


def first_marked(marked: Tensor, *, limit: int) -> Places:
    """The first `limit` = S marks of each row of (N, B), in rising order, found without waiting for the device."""
    rank = marked.cumsum(dim=1)
    # Those that are not marked, and those over the limit, share a slot that is cut off.
    slot = torch.where(marked, rank - 1, limit).clamp(max=limit)
    everywhere = torch.arange(marked.shape[1], device=marked.device).expand_as(slot)
    position = everywhere.new_zeros(len(marked), limit + 1).scatter_(1, slot, everywhere)[:, :limit]
    return Places(position, torch.arange(limit, device=marked.device) < marked.sum(dim=1, keepdim=True))


def full_precision(values: Tensor) -> Tensor:
    """In float32 where they are in less."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _per_coordinate(sizes: Tensor) -> Tensor:
    return sizes.flip(-1).repeat((1,) * (sizes.dim() - 1) + (2,))  # (..., 4) width, height, width, height

"""Region proposal network (Ren et al. 2015): pyramid levels enter, a fixed number of proposals per image leaves.

The best anchors of each level are chosen by their logits first; only those are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import boxes as box_math
from model.anchors import anchors_at
from model.conv_norm import ConvNorm, adds_by_kernel
from model.fused_conv import pointwise_in_float32, pointwise_together
from model.nms import segment_nms
from model.recipe import Recipe
from model.structures import ImageSize

# N images, L levels of H × W cells, A anchors in a cell, P proposals of an image.


class RPNHead(nn.Module):
    """3×3 convolutions shared by the levels, then objectness and box deltas of every anchor."""

    def __init__(self, *, in_channels: int, anchors_per_cell: int, num_convs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(ConvNorm(in_channels, in_channels, kernel_size=3) for _ in range(num_convs)))
        self.objectness = nn.Conv2d(in_channels, anchors_per_cell, kernel_size=1)
        self.deltas = nn.Conv2d(in_channels, anchors_per_cell * 4, kernel_size=1)
        self.fused = False
        """Whether what follows a product runs with it, as in a fused ConvNorm."""

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convs(level)
        if self.fused:
            outputs = pointwise_in_float32([self.objectness, self.deltas], x)
            return outputs[0].flatten(1), outputs[1].reshape(len(x), -1, 4)
        if adds_by_kernel(x):
            objectness, deltas = pointwise_together([self.objectness, self.deltas], x)  # (N, H, W, A), (N, H, W, 4 A)
        else:
            objectness, deltas = (layer(x).permute(0, 2, 3, 1) for layer in (self.objectness, self.deltas))
        return objectness.float().flatten(1), deltas.float().reshape(len(x), -1, 4)  # (N, H W A), (N, H W A, 4)


class Proposals(NamedTuple):
    """P places for each image, best first; the empty ones hold a box of zeros."""

    boxes: Tensor
    """(N, P, 4) in the padded input's frame."""
    valid: Tensor
    """(N, P) whether the place is filled."""


def propose(
    outputs: Sequence[tuple[Tensor, Tensor]],
    cells: Sequence[Tensor],
    *,
    grids: Sequence[ImageSize],
    strides: Sequence[ImageSize],
    image_sizes: Tensor,
    recipe: Recipe,
) -> Proposals:
    """Proposals from the head's outputs for each level; `image_sizes` (N, 2) are inside the padding."""
    chosen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for (objectness, all_deltas), cell, grid, stride in zip(outputs, cells, grids, strides, strict=True):
        logits, index = objectness.topk(min(recipe.rpn_pre_nms, objectness.shape[1]), dim=1)  # (N, k)
        anchors = anchors_at(index, cell, grid=grid, stride=stride)  # (N, k, 4)
        deltas = all_deltas.gather(1, index[..., None].expand(-1, -1, 4))  # (N, k, 4)
        chosen.append((logits, anchors, deltas, index.new_full(index.shape, len(chosen))))
    logits, anchors, deltas, level_index = (torch.cat(parts, dim=1) for parts in zip(*chosen, strict=True))  # (N, Σk…)
    boxes = box_math.decode(deltas, anchors, weights=recipe.rpn_delta_weights, max_log_scale=recipe.max_log_scale)
    boxes = box_math.clip(boxes, image_sizes[:, None])
    scores = logits.sigmoid()
    usable = box_math.wide_enough(boxes, recipe.rpn_min_side) & (scores >= recipe.rpn_score_threshold)
    if recipe.rpn_ranking == "logit":
        scores = logits

    image_index, place = usable.nonzero(as_tuple=True)  # (B,), (B,)
    boxes, scores = boxes[image_index, place], scores[image_index, place]  # (B, 4), (B,)
    segments = image_index * len(chosen) + level_index[image_index, place]
    kept = segment_nms(boxes, scores, segments, recipe.rpn_nms_threshold)
    position, valid = box_math.first_of_each_image(
        image_index[kept], num_images=len(usable), limit=recipe.rpn_post_nms
    )  # (N, P)
    return Proposals(_take(boxes[kept], position, valid), valid)


def _take(boxes: Tensor, position: Tensor, valid: Tensor) -> Tensor:
    if len(boxes) == 0:
        return boxes.new_zeros(*position.shape, 4)
    return boxes[position] * valid[..., None]

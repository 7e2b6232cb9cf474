"""Region proposal network (Ren et al. 2015): pyramid levels enter, a fixed number of proposals per image leaves.

The best anchors of each level are chosen by their logits first; only those are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model import boxes as box_math
from model.anchors import anchors_at
from model.conv_norm import ConvNorm, adds_by_kernel
from model.fused_conv import pointwise_in_float32, pointwise_together
from model.nms import segment_nms
from model.recipe import Recipe
from model.structures import ImageSize
from model.transfers import to_device

# N images, L levels of H × W cells and C channels, A anchors in a cell, P proposals of an image, S of its anchors.


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

    def of_anchors(self, levels: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """The same, (N, S) and (N, S, 4), of some anchors of each image, `index` (N, S) over all levels, computed from
        the cells around them.

        Training learns of a few hundred anchors of an image: the gradients of the others are zeros, which those of
        `forward` would be computed with all the same.
        """
        anchors_per_cell = self.objectness.out_channels
        kind = index.remainder(anchors_per_cell).flatten()[:, None]  # (N S, 1)
        x, inside = _around(levels, index.div(anchors_per_cell, rounding_mode="floor"), reach=len(self.convs))
        for part in self.convs:
            assert isinstance(part, ConvNorm)
            windows = x.unfold(1, 3, 1).unfold(2, 3, 1)  # (N S, K - 2, K - 2, C, 3, 3)
            x = F.linear(windows.flatten(3), part.conv.weight.flatten(1), part.conv.bias).relu_()
            inside = inside[:, 1:-1, 1:-1]
            x = x.where(inside[..., None], 0)  # as padding has it
        outputs = [
            F.linear(x.flatten(1), layer.weight.flatten(1), layer.bias).float()
            for layer in (self.objectness, self.deltas)
        ]  # (N S, A), (N S, 4 A)
        objectness = outputs[0].gather(1, kind)  # (N S, 1)
        deltas = outputs[1].view(len(kind), -1, 4).gather(1, kind[..., None].expand(-1, 1, 4))  # (N S, 1, 4)
        return objectness.view(index.shape), deltas.view(*index.shape, 4)


def _around(levels: Sequence[Tensor], cell: Tensor, *, reach: int) -> tuple[Tensor, Tensor]:
    """(N S, K, K, C) the cells of `levels` (N, C, H, W) that are at most `reach` = (K - 1) / 2 from each `cell` (N, S),
    which counts over all levels, and (N S, K, K) whether they are on its map; zeros where they are not."""
    num_images = len(cell)
    layout, first = [], 0
    for height, width in (level.shape[2:] for level in levels):
        layout.append([first, height, width])
        first += height * width
    of_levels = to_device(torch.tensor(layout), cell.device)  # (L, 3)
    level_index = (cell[..., None] >= of_levels[1:, 0]).sum(dim=-1)  # (N, S)
    first_cell, heights, widths = of_levels[level_index][..., None, None].unbind(2)  # (N, S, 1, 1) each
    own = cell[..., None, None] - first_cell
    offset = torch.arange(-reach, reach + 1, device=cell.device)
    y, x = own.div(widths, rounding_mode="floor") + offset[:, None], own.remainder(widths) + offset
    inside = (y >= 0) & (y < heights) & (x >= 0) & (x < widths)  # (N, S, K, K)
    y, x = (torch.minimum(place.clamp(min=0), size - 1) for place, size in ((y, heights), (x, widths)))
    image = torch.arange(num_images, device=cell.device)[:, None, None, None]
    row = num_images * first_cell + (image * heights + y) * widths + x
    table = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels])  # (Σ N H W, C)
    maps: Tensor = _Rows.apply(table, row.flatten()).view(*row.shape, -1)
    return maps.where(inside[..., None], 0).flatten(0, 1), inside.flatten(0, 1)


class _Rows(torch.autograd.Function):
    """(B, C) rows of a table (P, C), some of them more than once. Their gradients are added up in float32, and on a CPU
    in the same order each time, which torch's own are not."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.num_rows, ctx.dtype = len(table), table.dtype
        return table.index_select(0, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (row,) = ctx.saved_tensors
        gradient = box_math.full_precision(gradient)
        sums = gradient.new_zeros(ctx.num_rows, gradient.shape[1]).index_add_(0, row, gradient)
        return sums.to(ctx.dtype), None


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

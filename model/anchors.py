"""Anchors: the boxes the RPN's deltas are relative to, always float32.

Anchors are never laid out over the whole image: those the RPN selects are computed from their indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.recipe import Recipe
from model.structures import ImageSize

# A anchors in a cell, H × W cells of one level; an anchor's index is (y * W + x) * A + a.


def cell_anchors(size: float, aspect_ratios: Sequence[float], *, rounded: bool) -> Tensor:
    """(A, 4) the anchors of a cell at the origin, centred there; an aspect ratio is height over width."""
    roots = torch.sqrt(torch.tensor(aspect_ratios, dtype=torch.float32))  # (A,)
    widths, heights = size * (1 / roots), size * roots
    anchors = torch.stack((-widths, -heights, widths, heights), dim=1) / 2  # (A, 4)
    return anchors.round() if rounded else anchors


def anchors_of(config: ModelConfig, recipe: Recipe) -> list[Tensor]:
    """The anchors of a cell for each level the RPN sees: of one size, or of all (sizes outer) where there is one."""
    cells = [
        cell_anchors(size, config.aspect_ratios, rounded=recipe.anchors_rounded) for size in config.anchor_sizes
    ]  # (A, 4) each
    return cells if config.neck == "fpn" else [torch.cat(cells)]


def cell_strides(
    input_size: ImageSize, grids: Sequence[ImageSize], *, rule: Literal["fitted", "fixed"]
) -> list[ImageSize]:
    """Pixels between the cells of each level of a pyramid from P2 on, or of C4 where there is one level.

    Whole ones that fit the input, or the level's own: at P6 13 rows of 800 pixels are 61 apart, or 64.
    """
    if rule == "fitted":
        return [ImageSize(input_size.height // grid.height, input_size.width // grid.width) for grid in grids]
    first = 2 if len(grids) > 1 else 4
    return [ImageSize(2**level, 2**level) for level in range(first, first + len(grids))]


def anchors_at(index: Tensor, cell: Tensor, *, grid: ImageSize, stride: ImageSize) -> Tensor:
    """(..., 4) the anchors with these indices in a level of `grid` cells whose origin has the anchors `cell`."""
    per_row = grid.width * len(cell)
    y = index.div(per_row, rounding_mode="floor") * stride.height
    x = index.remainder(per_row).div(len(cell), rounding_mode="floor") * stride.width
    shift = torch.stack((x, y, x, y), dim=-1)  # (..., 4)
    return cell[index.remainder(len(cell))] + shift

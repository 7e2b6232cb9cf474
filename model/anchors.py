"""Anchors: the boxes the RPN's deltas are relative to, always float32.

Anchors are never laid out over the whole image: those the RPN selects are computed from their indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.structures import ImageSize

# A anchors in a cell, H × W cells of one level; an anchor's index is (y * W + x) * A + a.


def cell_anchors(size: float, aspect_ratios: Sequence[float], *, rounded: bool) -> Tensor:
    """(A, 4) the anchors of a cell at the origin, centred there; an aspect ratio is height over width."""
    roots = torch.sqrt(torch.tensor(aspect_ratios, dtype=torch.float32))  # (A,)
    widths, heights = size * (1 / roots), size * roots
    anchors = torch.stack((-widths, -heights, widths, heights), dim=1) / 2  # (A, 4)
    return anchors.round() if rounded else anchors


def cell_stride(input_size: ImageSize, grid: ImageSize) -> ImageSize:
    """Pixels between cells: whole ones, which at P6 may fall short of 64 (13 rows of 800 pixels: 61)."""
    return ImageSize(input_size.height // grid.height, input_size.width // grid.width)


def anchors_at(index: Tensor, cell: Tensor, *, grid: ImageSize, stride: ImageSize) -> Tensor:
    """(..., 4) the anchors with these indices in a level of `grid` cells whose origin has the anchors `cell`."""
    per_row = grid.width * len(cell)
    y = index.div(per_row, rounding_mode="floor") * stride.height
    x = index.remainder(per_row).div(len(cell), rounding_mode="floor") * stride.width
    shift = torch.stack((x, y, x, y), dim=-1)  # (..., 4)
    return cell[index.remainder(len(cell))] + shift

"""Rounding of weights to bfloat16 that keeps what a kernel does to an even map.

To the nearest, the roundings of a kernel's cells add up by chance, and an even map moves by their sum wherever it is
even. Here each cell is rounded together with what the cells before it left over (error diffusion, Floyd & Steinberg
1976), so that the sum of a kernel is off by one rounding and not by as many as it has cells.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_bfloat16(weight: Tensor) -> Tensor:
    """(K, C, R, S) of a convolution, rounded so."""
    cells = weight.double().flatten(2).unbind(-1)  # R S of (K, C)
    left, rounded = torch.zeros_like(cells[0]), []
    for cell in cells:
        rounded.append((cell + left).to(torch.bfloat16))
        left += cell - rounded[-1].double()
    return torch.stack(rounded, dim=-1).view_as(weight)

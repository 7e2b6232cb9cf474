"""A convolution with its norm and ReLU, and the folding of the norm into the convolution.

Training and weight files know convolution and norm; inference runs one convolution with a bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
"""Makes the norm of so many channels; it has weight, bias, running_mean, running_var and eps."""

_Module = TypeVar("_Module", bound=nn.Module)


class ConvNorm(nn.Module):
    """Convolution that keeps the size at stride 1, then norm, then ReLU; the last two where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        norm: Norm | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=norm is None
        )
        self.norm = None if norm is None else norm(out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x.relu_() if self.relu else x


def folded(module: _Module) -> _Module:
    """A copy of `module` whose convolutions have taken in the norms that follow them."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, ConvNorm) and part.norm is not None:
            _fold(part.conv, part.norm)
            part.norm = None
    return module


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    # in float64: each folded weight is rounded once
    weight, bias, mean, variance = (
        norm.get_buffer(name).double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight * (variance + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    conv.bias = nn.Parameter((bias - mean * scale).to(conv.weight.dtype))
    conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))

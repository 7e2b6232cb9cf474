"""A convolution with its norm and ReLU, and the folding of the norm into the convolution.

Training and weight files know convolution and norm; where speed counts, inference runs one convolution with a bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormForm = Literal["frozen", "batch"]
"""How the norm's two numbers for a channel are applied; the forms differ in the last bit."""

Norm = Callable[[int], nn.Module]
"""Makes the norm of so many channels; it has weight, bias, running_mean, running_var and eps."""

_Module = TypeVar("_Module", bound=nn.Module)


class FixedNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy 2015) whose statistics stay as they are."""

    def __init__(self, num_channels: int, *, eps: float, form: NormForm) -> None:
        super().__init__()
        self.eps = eps
        self.form = form
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = _statistics(self)
        if self.form == "batch":
            return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)
        scale = weight * (variance + self.eps).rsqrt()
        shift = bias - mean * scale
        return x.mul_(scale[:, None, None]).add_(shift[:, None, None])  # two roundings, as torchvision's frozen norm


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
    weight, bias, mean, variance = (value.double() for value in _statistics(norm))
    scale = weight * (variance + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    conv.bias = nn.Parameter((bias - mean * scale).to(conv.weight.dtype))
    conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))


def _statistics(norm: nn.Module) -> list[Tensor]:
    return [norm.get_buffer(name) for name in ("weight", "bias", "running_mean", "running_var")]

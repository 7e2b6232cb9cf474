"""Convolution, norm and ReLU as one part, and the folding of its norm into the convolution.

Maps enter and leave.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import winograd_in_training
from model.compiled_winograd import CompiledWinograd
from model.fused_conv import stem_on_cells
from model.kernels import run_kernels_on
from model.norm import FrozenNorm, Norm, statistics
from model.winograd import Winograd

_Module = TypeVar("_Module", bound=nn.Module)


class FusedConv(Protocol):
    """A convolution, the sum with `plus`, which it may overwrite, and the ReLU: `cudnn_conv` or `onednn_conv`."""

    def __call__(self, conv: nn.Conv2d, x: Tensor, plus: Tensor | None, *, relu: bool) -> Tensor: ...


class ConvNorm(nn.Module):
    """Convolution that keeps the size at stride 1, then norm, a sum with other maps and ReLU, where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        norm: Norm | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=norm is None,
        )
        self.norm = None if norm is None else norm(out_channels)
        self.relu = relu
        self.fused: FusedConv | None = None
        """What runs it as one operation, which wants channels-last, no norm and no gradients."""
        self.winograd: Winograd | CompiledWinograd | None = None
        """What convolves on a CPU where that is the faster form."""
        self.trains_by_winograd = False
        """Whether it may be convolved so on a CPU, with gradients, though its roundings are not the plain sum's."""

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """`plus` is added before the ReLU, and may be overwritten: the shortcut of a block."""
        if self.winograd is not None:
            return self.winograd(x, plus, relu=self.relu)
        if self.fused is not None:
            return self.fused(self.conv, x, plus, relu=self.relu)
        if adds_by_kernel(x):
            return self._in_training(x, plus)
        weight, bias, norm = self.conv.weight, self.conv.bias, self.norm
        in_half, x = autocasts(x), to_layer(x, self.conv)
        # In half precision the roundings need not be torchvision's, and passes over the maps are saved.
        if isinstance(norm, FrozenNorm) and in_half:  # nothing of it is trained, so it goes into the weights
            scale, bias = norm.scale_and_shift()
            weight, norm = weight * scale[:, None, None, None], None
        dtype = torch.get_autocast_dtype(x.device.type) if in_half else x.dtype
        if self.trains_by_winograd and winograd_in_training.pays(self.conv, x, dtype):
            x = winograd_in_training.convolve(x.to(dtype), weight, bias)
        else:
            x = F.conv2d(x, weight, bias, *_shape(self.conv))
        x = x if norm is None else norm(x)
        if plus is not None:
            x = x.add_(plus)
        return x.relu_() if self.relu else x

    def _in_training(self, x: Tensor, plus: Tensor | None) -> Tensor:
        """On a GPU in half precision; `plus` may be a coarser map where there is no ReLU."""
        from model.conv_in_training import ConvShape, conv_in_training
        from model.kernels.maps import add_in_training

        weight, bias, shape = self.conv.weight, self.conv.bias, ConvShape(*_shape(self.conv))
        if _is_stem(self.conv) and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            x = x.to(torch.get_autocast_dtype(x.device.type))  # before it is written anew
            x, weight = stem_on_cells(weight, x, border=(2, 1))  # (N, 16, H/2 + 3, W/2 + 3), (K, 16, 4, 4)
            shape = ConvShape((1, 1), (0, 0), (1, 1), 1)  # so that none is over
        if self.norm is None:
            return conv_in_training(x, weight, bias, plus, shape, relu=self.relu)
        if isinstance(self.norm, FrozenNorm):
            scale, shift = self.norm.kept_scale_and_shift()
            return conv_in_training(x, weight, shift, plus, shape, scale=scale, relu=self.relu)
        maps = self.norm(conv_in_training(x, weight, bias, None, shape, relu=False))
        return add_in_training(maps, plus, relu=self.relu)


def adds_by_kernel(x: Tensor) -> bool:
    """Whether `x` is convolved in half precision on a GPU, with norm, bias, sum and ReLU in one operation."""
    return autocasts(x) and run_kernels_on(x.device)


def autocasts(x: Tensor) -> bool:
    """Whether autocast chooses the precision of what is computed of `x`."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def to_layer(x: Tensor, layer: nn.Module) -> Tensor:
    """`x` in the precision that `layer` computes in."""
    return x if autocasts(x) else x.to(next(layer.parameters()).dtype)


def _is_stem(conv: nn.Conv2d) -> bool:
    return (conv.in_channels, conv.kernel_size, conv.stride, conv.padding) == (3, (7, 7), (2, 2), (3, 3))


def _shape(conv: nn.Conv2d) -> tuple[Any, Any, Any, int]:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def folded(module: _Module) -> _Module:
    """A copy of `module` whose convolutions have taken in the norms that follow them; group norms cannot be."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, ConvNorm) and part.norm is not None and not isinstance(part.norm, nn.GroupNorm):
            _fold(part.conv, part.norm)
            part.norm = None
    return module


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    # in float64: each folded weight is rounded once
    weight, bias, mean, variance = (value.double() for value in statistics(norm))
    scale = weight * (variance + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    conv.bias = nn.Parameter((bias - mean * scale).to(conv.weight.dtype))
    conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))

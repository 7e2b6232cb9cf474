"""A trained convolution on a GPU with what is beside it: the norm in its weight, bias, other maps and ReLU behind it.

Maps enter and leave, channels-last, in half precision; parameters and their gradients are in float32. By torch's
operators each step reads and writes the whole map once more, and the host has twelve launches for one of these.
"""

# N images, C channels, K outputs.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.maps import add_to_map
from model.nearest import of_coarser


class ConvShape(NamedTuple):
    """As torch's operators take it."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int


def conv_in_training(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plus: Tensor | None,
    shape: ConvShape,
    *,
    scale: Tensor | None = None,
    relu: bool,
) -> Tensor:
    """``relu(scale * conv(x) + bias + plus)``, (N, K, H, W), in autocast's dtype; each of them where it is asked for.

    `scale` (K,) is that of a norm which is not trained. Without a ReLU `plus` may be smaller maps, whose nearest cells
    are taken. Gradients go to all but the scale; what the ReLU leaves is kept for them, and not what enters it. With a
    ReLU the bias is rounded to that dtype, as cuDNN wants it.
    """
    maps: Tensor = _Conv.apply(x, weight, scale, bias, plus, shape, relu)
    return maps


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        plus: Tensor | None,
        shape: ConvShape,
        relu: bool,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype, memory_format=torch.channels_last)
        half = torch.empty_like(weight, dtype=dtype)
        if scale is None:
            half.copy_(weight)
        else:
            torch.mul(weight, scale[:, None, None, None], out=half)
        plus = None if plus is None else plus.to(dtype, memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            maps = _convolve(x, half, bias, plus, shape, relu=relu)
        ctx.save_for_backward(x, half, scale, maps if relu else None)
        ctx.shape, ctx.plus_size = shape, None if plus is None else plus.shape[2:]
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, half, scale, maps = ctx.saved_tensors
        of_x, of_weight, _, of_bias, of_plus, *_ = ctx.needs_input_grad
        if maps is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, maps, 0)
        stride, padding, dilation, groups = ctx.shape
        x_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
            gradient, x, half, None, stride, padding, dilation, False, (0, 0), groups, (of_x, of_weight, False)
        )
        if of_weight and scale is not None:
            weight_gradient = weight_gradient * scale[:, None, None, None]
        return (
            x_gradient,
            weight_gradient,
            None,
            gradient.sum(dim=(0, 2, 3), dtype=torch.float32) if of_bias else None,
            of_coarser(gradient, ctx.plus_size) if of_plus else None,
            None,
            None,
        )


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None, shape: ConvShape, *, relu: bool
) -> Tensor:
    in_order = torch.are_deterministic_algorithms_enabled()  # which cuDNN's fused kernels are not held to
    if not relu or x.device.type != "cuda" or x.numel() == 0 or in_order:
        maps = F.conv2d(x, weight, None, *shape)
        return maps if bias is None and plus is None and not relu else add_to_map(maps, bias, plus, relu=relu)
    bias = None if bias is None else bias.to(x.dtype)
    if plus is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *shape)
    return torch.cudnn_convolution_add_relu(x, weight, plus, 1.0, bias, *shape)

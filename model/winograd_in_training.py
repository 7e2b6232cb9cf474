"""A trained 3×3 convolution on a CPU whose maps, and whose input's gradient, Winograd's form computes.

The gradient of what enters is the convolution of what leaves by the weight turned round, in and out exchanged. That of
the weight is torch's: a sum over the whole map has no tiles.
"""

# N images, C channels, K outputs.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.compiled_winograd import GROUP, CompiledWinograd, can_compute, has_bf16_tiles

FEWEST_CELLS, CELLS_PER_CHANNEL = 4_000, 24
"""Of a batch's maps. With fewer, the weight, which is laid out anew at each step, costs what the products spare."""
FEWEST_CHANNELS = {torch.float32: 32, torch.bfloat16: 64}
"""By the dtype of the maps. With fewer, what is done before and after the products costs it."""


def pays(conv: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `conv` of maps like `x`, in `dtype`, can be computed so and is the faster for it."""
    if x.device.type != "cpu" or dtype not in FEWEST_CHANNELS or (dtype == torch.bfloat16 and has_bf16_tiles()):
        return False
    channels = conv.in_channels, conv.out_channels
    return (
        min(channels) >= FEWEST_CHANNELS[dtype]
        and len(x) * x.shape[2] * x.shape[3] >= max(FEWEST_CELLS, CELLS_PER_CHANNEL * max(channels))
        and conv.in_channels % GROUP == 0  # which are the outputs, backward
        and can_compute(conv, in_integers=dtype == torch.bfloat16)
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, K, H, W) of the maps (N, C, H, W), in their dtype, which is float32, or bfloat16 with 16-bit integers within;
    weight (K, C, 3, 3) and bias (K,) in float32. Their gradients are computed in the maps' dtype."""
    maps: Tensor = _Conv.apply(x, weight, bias)
    return maps


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _by_winograd(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        x_gradient = _by_winograd(gradient, weight.flip(2, 3).transpose(0, 1), None) if of_x else None
        if not of_weight and not of_bias:
            return x_gradient, None, None
        sizes = [len(weight)] if ctx.has_bias else None
        shape = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        _, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradient, x, weight.to(x.dtype), sizes, *shape, (False, of_weight, of_bias)
        )
        return (
            x_gradient,
            weight_gradient.to(weight.dtype) if of_weight else None,
            bias_gradient.to(weight.dtype) if of_bias else None,
        )


def _by_winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # the weight is laid out in float32
        convolution = CompiledWinograd(weight, bias, in_integers=x.dtype == torch.bfloat16, dtype=x.dtype)
        return convolution(x, None, relu=False)

"""Convolutions and linear layers with what follows them, or beside each other, in one kernel.

Maps enter and leave, channels-last. By themselves bias, sum and ReLU each read and write the whole map again.
"""

# N images, C channels, K outputs.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 8
"""Outputs of a product in bfloat16 that tensor cores want a multiple of: 16 bytes."""


def can_fuse_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this build and processor have oneDNN's convolutions in `dtype`."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cudnn_conv(conv: nn.Conv2d, x: Tensor, plus: Tensor | None, *, relu: bool) -> Tensor:
    """``relu(conv(x) + plus)``, (N, C, H, W); the ReLU and the sum where asked for. No gradients.

    Without a ReLU `plus` may be smaller maps, whose nearest cells are taken.
    """
    from model.kernels.maps import add_to_map

    assert not isinstance(conv.padding, str)
    shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if not relu:
        y = F.conv2d(x, conv.weight, None, *shape)
        return y if conv.bias is None and plus is None else add_to_map(y, conv.bias, plus)
    if plus is None:
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *shape)
    return torch.cudnn_convolution_add_relu(x, conv.weight, plus, 1.0, conv.bias, *shape)


def onednn_conv(conv: nn.Conv2d, x: Tensor, plus: Tensor | None, *, relu: bool) -> Tensor:
    """The same on a CPU, in the dtype of the weight, by what torch's compiler makes of these.

    Of that dtype `plus` is overwritten: memory that was just read is the faster to write. Nothing is rounded before it
    is added, and nor is a float32 bias but beside `plus`.
    """
    assert plus is None or conv.groups == 1  # there is no such operator in bfloat16
    x, shape = x.to(conv.weight.dtype), (conv.padding, conv.stride, conv.dilation, conv.groups)
    if plus is None:
        return onednn(x, conv.weight, conv.bias, *shape, relu=relu)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return torch.ops.mkldnn._convolution_pointwise_.binary(  # type: ignore[no-any-return]
        plus.to(x.dtype), x, conv.weight, bias, *shape, "add", 1.0, "relu" if relu else None, [], None
    )


def onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Any = (0, 0),
    stride: Any = (1, 1),
    dilation: Any = (1, 1),
    groups: int = 1,
    *,
    relu: bool,
) -> Tensor:
    """A convolution, bias in either dtype, and its ReLU, on a CPU; no gradients."""
    shape, after = (padding, stride, dilation, groups), "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, after, [], "")  # type: ignore[no-any-return]


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(x weight^T + bias)``, (R, K) of x (R, C), as a 1×1 convolution, which both are added to as one."""
    if len(x) == 0:
        return x.new_zeros(0, len(weight))
    column = x[None, :, None].permute(0, 3, 1, 2)  # (1, C, R, 1), channels-last
    kernel = weight[..., None, None]
    if x.device.type == "cpu":
        y = onednn(column, kernel, bias, relu=True)
    else:
        y = torch.cudnn_convolution_relu(column, kernel, bias, (1, 1), (0, 0), (1, 1), 1)
    return y[0, :, :, 0].t()


def fused_stem(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """The 7×7 convolution at stride 2, its ReLU and the maximum behind it: (N, K, H/4, W/4)."""
    from model.kernels.maps import max_pool

    cells, weight = stem_on_cells(conv.weight, images)
    y = torch.cudnn_convolution_relu(cells, weight, conv.bias, (1, 1), (2, 2), (1, 1), 1)
    return max_pool(y, (cells.shape[2], cells.shape[3]))


def stem_on_cells(weight: Tensor, images: Tensor, *, border: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """Images and weight for the 4×4 convolution, padded by 2, that is the 7×7 one at stride 2, padded by 3, but for a
    last row and column that are over. The images get cells of zeros before and behind each axis, as many as `border`
    says.

    Tensor cores want channels by the sixteen, not three: of 2×2 pixels each makes a cell of 12 channels, to which 4 of
    zeros are added. The kernel, with a first row and column of zeros, has 4×4 such cells.
    """
    num_images, _, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).reshape(num_images, height // 2, 2, width // 2, 2, 3)
    cells = F.pad(pixels.transpose(2, 3).flatten(3), (0, 4, *border, *border))  # (N, H/2, W/2, 2 2 3 + 4)
    kernel = F.pad(weight, (1, 0, 1, 0)).view(-1, 3, 4, 2, 4, 2)  # (K, 3, 8, 8) in cells
    kernel = kernel.permute(0, 2, 4, 3, 5, 1).flatten(3)  # (K, 4, 4, 2 2 3)
    return cells.permute(0, 3, 1, 2), F.pad(kernel, (0, 4)).permute(0, 3, 1, 2)


def linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(R, K) float32 of x (R, C); in bfloat16 the sums are not rounded, as scores that are would tie by the hundred.

    A float32 weight is two bfloat16 ones, its rounding and what that leaves, so that 16 of its bits count.
    """
    if x.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    num_outputs = len(weight)
    weights = [weight.to(torch.bfloat16)]
    if weight.dtype == torch.float32:
        weights.append((weight - weights[0].float()).to(torch.bfloat16))
    padded = [F.pad(one, (0, 0, 0, -num_outputs % ALIGNED)) for one in weights]
    sums = torch.mm(x, torch.cat(padded).t(), out_dtype=torch.float32)  # (R, K or 2 K)
    parts = torch.split(sums, len(padded[0]), dim=1)
    total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return total[:, :num_outputs] + bias.float()


def pointwise_together(convs: Sequence[nn.Conv2d], x: Tensor) -> list[Tensor]:
    """(N, H, W, K) of each 1×1 convolution, with gradients: those of `x` are one product, and added up nowhere."""
    sizes = [conv.out_channels for conv in convs]
    missing = -sum(sizes) % ALIGNED
    weight = F.pad(torch.cat([conv.weight.flatten(1) for conv in convs]), (0, 0, 0, missing))  # (ΣK, C)
    bias = F.pad(torch.cat([conv.bias for conv in convs if conv.bias is not None]), (0, missing))
    y = F.conv2d(x, weight[..., None, None], bias).permute(0, 2, 3, 1)  # (N, H, W, ΣK)
    return list(torch.split(y, [*sizes, missing], dim=-1))[: len(sizes)]


def pointwise_in_float32(convs: Sequence[nn.Conv2d], x: Tensor) -> list[Tensor]:
    """(N, H, W, K) float32 of each 1×1 convolution, in one product."""
    weight = torch.cat([conv.weight.flatten(1) for conv in convs])  # (ΣK, C)
    bias = torch.cat([conv.bias for conv in convs if conv.bias is not None])
    if x.device.type == "cpu":  # where that is the faster product of so few outputs
        sums = F.conv2d(x, weight[..., None, None], bias).permute(0, 2, 3, 1)
        return list(torch.split(sums, [conv.out_channels for conv in convs], dim=-1))
    cells = x.permute(0, 2, 3, 1)  # (N, H, W, C)
    sums = linear_in_float32(cells.flatten(0, 2), weight, bias).view(*cells.shape[:3], len(weight))  # (N, H, W, ΣK)
    return list(torch.split(sums, [conv.out_channels for conv in convs], dim=-1))

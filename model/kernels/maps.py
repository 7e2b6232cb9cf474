"""What a pyramid does to whole maps besides convolving them, each in one pass over memory.

- `add_to_map`: a bias, and the shortcut of a block (He et al. 2015) or the next coarser level enlarged to the map's
  size (FPN, Lin et al. 2017), added in place, then a ReLU; `add_in_training`: the same, no bias, with gradients;
- `max_pool`: the 3×3 maximum at stride 2 behind the stem (He et al. 2015).

Maps are (N, C, H, W) in channels-last memory.
"""

# N images, C channels, H × W cells.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.nearest import of_coarser

BLOCK = 1024
"""Elements of a program."""


def add_to_map(x: Tensor, bias: Tensor | None = None, coarse: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """`x` itself, after `bias` (C,) and the nearest cells of `coarse` (N, C, h, w) have been added to it; with `relu`
    what is below zero then is zero."""
    channels, height, width = x.shape[1:]
    if x.numel() == 0:
        return x
    for values in (x, coarse):
        if values is not None and not values.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"maps must be channels-last, got {tuple(values.shape)} with strides {values.stride()}")
    coarse_height, coarse_width = (1, 1) if coarse is None else coarse.shape[2:]
    add[triton.cdiv(x.numel(), BLOCK),](
        x,
        bias,
        coarse,
        x.numel(),
        height,
        width,
        coarse_height,
        coarse_width,
        CHANNELS=channels,
        SAME=(coarse_height, coarse_width) == (height, width),
        RELU=relu,
        BLOCK=BLOCK,
        enable_fp_fusion=True,
    )
    return x


def add_in_training(x: Tensor, plus: Tensor | None, *, relu: bool) -> Tensor:
    """`add_to_map` of what a norm made, with gradients: no operation whose gradient needs its output may have made `x`.

    By torch's operators it is two passes over the map.
    """
    if plus is None and not relu:
        return x
    maps = [None if one is None else one.contiguous(memory_format=torch.channels_last) for one in (x, plus)]
    added: Tensor = _Add.apply(*maps, relu)
    return added


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plus: Tensor | None, relu: bool) -> Tensor:
        ctx.relu = relu
        ctx.plus_dtype, ctx.plus_size = (None, None) if plus is None else (plus.dtype, plus.shape[2:])
        ctx.mark_dirty(x)
        add_to_map(x, None, plus, relu=relu)
        if relu:
            ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.relu:
            gradient = torch.ops.aten.threshold_backward(gradient, *ctx.saved_tensors, 0)
        of_x, of_plus, _ = ctx.needs_input_grad
        return (
            gradient if of_x else None,
            of_coarser(gradient, ctx.plus_size).to(ctx.plus_dtype) if of_plus else None,
            None,
        )


def max_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, ceil(h / 2), ceil(w / 2)) of the upper left h × w = `size` cells of `x`."""
    num_images, channels, _, row_cells = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"the map must be channels-last, got {tuple(x.shape)} with strides {x.stride()}")
    height, width = size
    pooled = torch.empty(
        (num_images, channels, (height + 1) // 2, (width + 1) // 2),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    pool[triton.cdiv(pooled.numel(), BLOCK),](
        x,
        pooled,
        pooled.numel(),
        height,
        width,
        row_cells,
        x.shape[2] * row_cells,
        CHANNELS=channels,
        BLOCK=BLOCK,
        enable_fp_fusion=True,
    )
    return pooled


@triton.jit(do_not_specialize=["height", "width", "coarse_height", "coarse_width"])  # type: ignore[untyped-decorator]
def add(  # type: ignore[no-untyped-def]
    x,
    bias,
    coarse,
    num_elements,
    height,
    width,
    coarse_height,
    coarse_width,
    CHANNELS: tl.constexpr,  # noqa: N803
    SAME: tl.constexpr,  # noqa: N803
    RELU: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = element < num_elements
    channel = (element % CHANNELS).to(tl.int32)
    value = tl.load(x + element, mask=there).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=there).to(tl.float32)
    if coarse is not None:
        if SAME:
            value += tl.load(coarse + element, mask=there).to(tl.float32)
        else:
            cell = element // CHANNELS
            column = (cell % width).to(tl.int32)
            row = ((cell // width) % height).to(tl.int32)
            image = cell // (height * width)
            # Nearest as torch has it for whole ratios and for the odd sides a pyramid has: floor(i * in / out).
            coarse_row = row * coarse_height // height
            coarse_column = column * coarse_width // width
            coarse_cell = (image * coarse_height + coarse_row) * coarse_width + coarse_column
            value += tl.load(coarse + coarse_cell * CHANNELS + channel, mask=there).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(x + element, value.to(x.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["height", "width", "row_cells", "image_cells"])  # type: ignore[untyped-decorator]
def pool(  # type: ignore[no-untyped-def]
    x,
    pooled,
    num_elements,
    height,
    width,
    row_cells,
    image_cells,
    CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = element < num_elements
    channel = element % CHANNELS
    cell = element // CHANNELS
    pooled_width = (width + 1) // 2
    pooled_height = (height + 1) // 2
    column = (cell % pooled_width).to(tl.int32) * 2
    row = ((cell // pooled_width) % pooled_height).to(tl.int32) * 2
    image = cell // (pooled_height * pooled_width)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            y, x_ = row + dy, column + dx
            inside = there & (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
            source = (image * image_cells + y * row_cells + x_) * CHANNELS + channel
            best = tl.maximum(best, tl.load(x + source, mask=inside, other=float("-inf")).to(tl.float32))
    tl.store(pooled + element, best.to(pooled.dtype.element_ty), mask=there)

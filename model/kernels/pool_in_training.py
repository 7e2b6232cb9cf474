"""The 3×3 maximum at stride 2, padding 1, behind a ResNet's stem (He et al. 2015), with its gradient.

Maps are (N, C, H, W) in channels-last memory, what is pooled from them (N, C, ceil(H / 2), ceil(W / 2)). The forward
pass keeps for each window which of its cells was the largest, one byte; the backward pass gathers, so that each
gradient is written once, in one fixed order of summation.
"""

# N images, C channels, H × W cells of the map, P × Q windows over them.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024
"""Elements of a program."""


def max_pool_in_training(x: Tensor) -> Tensor:
    """(N, C, P, Q) the largest of each window of `x`. What is no number is the largest; of equal cells the first, row
    by row, gets the gradient, as in torch's kernel for CPUs."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"the map must be channels-last, got {tuple(x.shape)} with strides {x.stride()}")
    if torch.is_grad_enabled() and x.requires_grad:
        pooled: Tensor = _MaxPool.apply(x)
        return pooled
    return _pool(x, None)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        kept = _empty(_pooled_shape(x.shape), x, torch.uint8)
        ctx.save_for_backward(kept)
        return _pool(x, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        _, channels, *size = ctx.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = _empty(ctx.shape, gradient, gradient.dtype)
        if of_x.numel() > 0:
            gather_gradients[triton.cdiv(of_x.numel(), BLOCK),](
                gradient, kept, of_x, of_x.numel(), *size, CHANNELS=channels, BLOCK=BLOCK, enable_fp_fusion=True
            )
        return of_x


def _pool(x: Tensor, kept: Tensor | None) -> Tensor:
    """(N, C, P, Q); writes to `kept`, where given, which of its nine cells each window took."""
    pooled = _empty(_pooled_shape(x.shape), x, x.dtype)
    if pooled.numel() > 0:
        pool_and_keep[triton.cdiv(pooled.numel(), BLOCK),](
            x, pooled, kept, pooled.numel(), *x.shape[2:], CHANNELS=x.shape[1], BLOCK=BLOCK, enable_fp_fusion=True
        )
    return pooled


def _pooled_shape(shape: torch.Size) -> tuple[int, int, int, int]:
    num_images, channels, height, width = shape
    return num_images, channels, (height + 1) // 2, (width + 1) // 2


def _empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


@triton.jit(do_not_specialize=["height", "width"])  # type: ignore[untyped-decorator]
def pool_and_keep(  # type: ignore[no-untyped-def]
    x,
    pooled,
    kept,
    num_elements,
    height,
    width,
    CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    first, lane, first_image, first_row, image, row, column, channel = place(
        (height + 1) // 2, (width + 1) // 2, CHANNELS, BLOCK
    )
    there = lane < num_elements - first
    x += (first_image * height + 2 * first_row) * width * CHANNELS
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    cell = tl.where(row > 0, 0, 3) + tl.where(column > 0, 0, 1)  # the first on the map, should all be -inf
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            y, x_ = 2 * row + dy, 2 * column + dx
            inside = there & (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
            source = ((image * height + y - 2 * first_row) * width + x_) * CHANNELS + channel
            value = tl.load(x + source, mask=inside, other=float("-inf")).to(tl.float32)
            larger = (value > best) | (value != value)  # noqa: PLR0124
            best = tl.where(larger, value, best)
            cell = tl.where(larger, 3 * (dy + 1) + dx + 1, cell)
    tl.store(pooled + first + lane, best.to(pooled.dtype.element_ty), mask=there)
    if kept is not None:
        tl.store(kept + first + lane, cell.to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=["height", "width"])  # type: ignore[untyped-decorator]
def gather_gradients(  # type: ignore[no-untyped-def]
    of_pooled,
    kept,
    of_x,
    num_elements,
    height,
    width,
    CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    first, lane, first_image, first_row, image, y, x_, channel = place(height, width, CHANNELS, BLOCK)
    there = lane < num_elements - first
    pooled_height, pooled_width = (height + 1) // 2, (width + 1) // 2
    base = (first_image * pooled_height + first_row // 2) * pooled_width * CHANNELS
    total = tl.zeros((BLOCK,), tl.float32)
    for down in tl.static_range(2):  # an even row is in one window, an odd one in the next as well
        for right in tl.static_range(2):
            row, column = y // 2 + down, x_ // 2 + right
            dy, dx = y - 2 * row, x_ - 2 * column
            inside = there & (dy >= -1) & (dx >= -1) & (row < pooled_height) & (column < pooled_width)
            source = ((image * pooled_height + row - first_row // 2) * pooled_width + column) * CHANNELS + channel
            cell = tl.load(kept + base + source, mask=inside, other=9)
            value = tl.load(of_pooled + base + source, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(cell == 3 * (dy + 1) + dx + 1, value, 0.0)
    tl.store(of_x + first + lane, total.to(of_x.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def place(height, width, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Where a program's elements are on a map: its first element, image and row, then per element the lane, the images
    after that first one, row, column, channel. Only what grows with the whole map is 64 bits wide."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    first_cell = first // CHANNELS
    # That a program begins with a cell the compiler would not see, and load each channel by itself.
    element = lane if BLOCK % CHANNELS == 0 else (first % CHANNELS).to(tl.int32) + lane
    cell = (first_cell % width).to(tl.int32) + element // CHANNELS
    rows = first_cell // width
    first_row = (rows % height).to(tl.int32)
    row = first_row + cell // width
    return first, lane, rows // height, first_row, row // height, row % height, cell % width, element % CHANNELS

"""From bytes on the device to the network's input, in one launch: resize, normalise, pad as `model/transform.py` does.

Greys are resized before they are normalised, not after: both are linear, so this differs in rounding alone.
"""

# N images, B bytes of all of them, H and W an image's sides, Hp and Wp the input's, E elements of a row of the input.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from model.recipe import Recipe

ELEMENTS = 1024
"""Neighbouring elements of one program: what four warps store, sixteen bytes a thread, in bfloat16."""
ROWS = 16
"""Rows of one program, which share the arithmetic of x."""


def lay_out(
    pixels: Tensor,
    offsets: Tensor,
    image_sizes: Tensor,
    resized_sizes: Tensor,
    out: Tensor,
    *,
    recipe: Recipe,
) -> None:
    """All images of a batch, bytes end to end, into the network's input: resized, normalised, zeros around them.

    pixels (B,) uint8: RGB images (H, W, 3); offsets (N,) int64: where each begins; image_sizes, resized_sizes (N, 2)
    int32 or int64: height, width; out (N, 3, Hp, Wp) bfloat16 or float32, channels last, of which every element is
    written. An image resized to (0, 0) is all zeros, and its bytes are not read: so a batch may be short of images.
    """
    if recipe.resize != "torchvision":
        raise ValueError(f"resize must be 'torchvision', got {recipe.resize!r}")
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out must be channels last in memory, got strides {out.stride()}")
    for name, tensor in (("offsets", offsets), ("image_sizes", image_sizes), ("resized_sizes", resized_sizes)):
        if len(tensor) != len(out) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, a row for each of {len(out)} images, got {tensor.shape}")
    num_images, _, height, width = out.shape
    grid = (triton.cdiv(width * 3, ELEMENTS), triton.cdiv(height, ROWS), num_images)
    with torch.cuda.device(out.get_device()):  # Triton launches on the current device
        lay_out_rows[grid](
            pixels,
            offsets,
            image_sizes,
            resized_sizes,
            out,
            height,
            width,
            *(1 / (recipe.pixel_range * std) for std in recipe.pixel_std),
            *(-mean / std for mean, std in zip(recipe.pixel_mean, recipe.pixel_std, strict=True)),
            bgr=recipe.channel_order == "BGR",
            num_rows=ROWS,
            num_elements=ELEMENTS,
            enable_fp_fusion=True,  # as torch's kernel is compiled; see `_neighbours`
        )


@triton.jit  # type: ignore[untyped-decorator]
def lay_out_rows(
    pixels: tl.tensor,
    offsets: tl.tensor,
    image_sizes: tl.tensor,
    resized_sizes: tl.tensor,
    out: tl.tensor,
    padded_height: tl.tensor,
    padded_width: tl.tensor,
    gain_0: tl.tensor,
    gain_1: tl.tensor,
    gain_2: tl.tensor,
    bias_0: tl.tensor,
    bias_1: tl.tensor,
    bias_2: tl.tensor,
    bgr: tl.constexpr,
    num_rows: tl.constexpr,
    num_elements: tl.constexpr,
) -> None:
    """One program: `num_elements` neighbouring elements of `num_rows` rows of one image.

    In channels-last memory a row's elements lie pixel by pixel, so lanes write without gaps whatever their channel.
    """
    image = tl.program_id(2)
    height = tl.load(image_sizes + 2 * image).to(tl.int32)
    width = tl.load(image_sizes + 2 * image + 1).to(tl.int32)
    resized_height = tl.load(resized_sizes + 2 * image).to(tl.int32)
    resized_width = tl.load(resized_sizes + 2 * image + 1).to(tl.int32)

    element = tl.program_id(0) * num_elements + tl.arange(0, num_elements)  # (E,)
    x, channel = element // 3, element % 3
    gain = tl.where(channel == 0, gain_0, tl.where(channel == 1, gain_1, gain_2))
    bias = tl.where(channel == 0, bias_0, tl.where(channel == 1, bias_1, bias_2))
    byte = 2 - channel if bgr else channel  # of an RGB pixel
    left, right, rightness = _neighbours(x, width, resized_width)
    left, right = left * 3 + byte, right * 3 + byte

    first_byte = pixels + tl.load(offsets + image)
    row_bytes = width.to(tl.int64) * 3
    inside = x < resized_width  # (E,)
    held = tl.full((), -2, tl.int32)  # the image's row that `upper` was made of; -2 is none, nor next to any
    upper = tl.full((num_elements,), 0.0, tl.float32)  # (E,)
    lower = upper  # (E,) of the row below
    for row in range(num_rows):
        y = tl.program_id(1) * num_rows + row
        top, bottom, lowness = _neighbours(y, height, resized_height)
        if top != held:  # where an image is enlarged, most rows lie between the same two as before or one further on
            if top == held + 1:
                upper = lower
            else:
                upper = _values(first_byte + top * row_bytes, left, right, rightness, inside, gain, bias)  # (E,)
            lower = _values(first_byte + bottom * row_bytes, left, right, rightness, inside, gain, bias)  # (E,)
            held = top
        value = tl.where(y < resized_height, upper + lowness * (lower - upper), 0.0)  # (E,)
        begin = (image.to(tl.int64) * padded_height + y) * padded_width * 3
        written = element < tl.where(y < padded_height, padded_width * 3, 0)  # (E,)
        tl.store(out + begin + element, value.to(out.dtype.element_ty), mask=written)


@triton.jit  # type: ignore[untyped-decorator]
def _neighbours(index: tl.tensor, side: tl.tensor, resized_side: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The pixels before and after the centre of pixel `index` of the resized side, and how near it is to the latter.

    In the order and precision of torch's area_pixel_compute_source_index, or else a pixel at 1000 moves by 1e-4.
    """
    ratio = tl.div_rn(side.to(tl.float32), tl.maximum(resized_side, 1).to(tl.float32))
    position = tl.maximum(ratio * (index + 0.5) - 0.5, 0.0)
    before = tl.minimum(position.to(tl.int32), side - 1)
    after = tl.minimum(before + 1, side - 1)
    return before, after, tl.minimum(position - before, 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def _values(
    row: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    rightness: tl.tensor,
    inside: tl.tensor,
    gain: tl.tensor,
    bias: tl.tensor,
) -> tl.tensor:
    """(E,) float32: a row of the image resized along x alone and normalised, zeros outside."""
    from_left = tl.load(row + left, mask=inside).to(tl.float32)
    from_right = tl.load(row + right, mask=inside).to(tl.float32)
    return tl.where(inside, (from_left + rightness * (from_right - from_left)) * gain + bias, 0.0)


class Staging:
    """Page-locked host memory from which batches of images are copied to the device.

    Two used in turn let one be filled while the other's copy is under way: before it is filled, each waits for its own
    last copy and for nothing else. On the CPU it is plain memory.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._copied: torch.cuda.Event | None = None
        self._host = self._allocate(num_bytes)

    def send(
        self, images: Sequence[NDArray[np.uint8]], *, into: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (H, W, 3) as `lay_out` takes them, pixels (B,) and offsets (N,), copied in the current stream.

        `into`: tensors for them, of which the first elements are written; they keep their addresses, as the inputs of
        a captured graph must.
        """
        ends = np.cumsum([0, *(image.size for image in images)], dtype=np.int64)
        num_bytes = int(ends[-1])
        if self._copied is not None:
            self._copied.synchronize()
        if num_bytes > len(self._host):
            self._host = self._allocate(max(num_bytes, 2 * len(self._host)))
        host = self._host.numpy()
        for image, begin, end in zip(images, ends[:-1], ends[1:], strict=True):
            np.copyto(host[begin:end].reshape(image.shape), image)
        return self._copy(self._host[:num_bytes], torch.from_numpy(ends[:-1]), into)

    def _copy(self, pixels: Tensor, offsets: Tensor, into: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            offsets = offsets.pin_memory()  # torch keeps it until its copy is done
        if into is None:
            into = torch.empty_like(pixels, device=self._device), torch.empty_like(offsets, device=self._device)
        for there, here in zip(into, (pixels, offsets), strict=True):
            there[: len(here)].copy_(here, non_blocking=True)
        if on_cuda:
            self._copied = torch.cuda.current_stream(self._device).record_event()
        return into

    def _allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

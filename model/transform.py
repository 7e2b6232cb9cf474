"""From images to the network's input: normalise, resize, pad; and the sizes that follow from an image's.

uint8 RGB (H, W, 3) arrays enter; one float (N, 3, H, W) tensor leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.pillow_resize import pillow_resize
from model.recipe import Recipe
from model.structures import ImageSize


def resized_size(
    size: ImageSize, *, min_size: int, max_size: int, rule: Literal["torchvision", "detectron2"] = "torchvision"
) -> ImageSize:
    """The size the short side's rule gives: sides rounded down (torchvision) or to the nearest, never to nothing."""
    if rule == "torchvision":
        factor = min(min_size / min(size), max_size / max(size))
        return ImageSize(max(1, math.floor(size.height * factor)), max(1, math.floor(size.width * factor)))
    # in detectron2's order: the long side's bound is applied to the sides the short one's gave
    factor = min_size / min(size)
    height, width = size.height * factor, size.width * factor
    if max(height, width) > max_size:
        factor = max_size / max(height, width)
        height, width = height * factor, width * factor
    return ImageSize(max(1, math.floor(height + 0.5)), max(1, math.floor(width + 0.5)))


def padded_size(size: ImageSize, *, divisor: int) -> ImageSize:
    """The next size up whose sides are multiples of `divisor`."""
    return ImageSize(-(-size.height // divisor) * divisor, -(-size.width // divisor) * divisor)


def common_size(sizes: Sequence[ImageSize], *, divisor: int) -> ImageSize:
    """The least padded size that holds each of `sizes`."""
    largest = ImageSize(max(size.height for size in sizes), max(size.width for size in sizes))
    return padded_size(largest, divisor=divisor)


def check_images(images: Sequence[NDArray[np.uint8]]) -> None:
    """Raise ValueError for what is not a uint8 (H, W, 3) array with pixels."""
    for index, image in enumerate(images):
        if not isinstance(image, np.ndarray):
            raise ValueError(f"image {index} is a {type(image).__name__}; give a NumPy uint8 array (H, W, 3)")
        if image.dtype != np.uint8:
            raise ValueError(f"image {index} has dtype {image.dtype}; give uint8, RGB from 0 to 255")
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image {index} has shape {image.shape}; give (H, W, 3), in RGB")
        if image.size == 0:
            raise ValueError(f"image {index} has shape {image.shape}; give at least one pixel")


def to_input(
    images: Sequence[NDArray[np.uint8]],
    sizes: Sequence[ImageSize],
    *,
    padded: ImageSize,
    recipe: Recipe,
    device: torch.device,
) -> Tensor:
    """(N, 3, H, W) the images at `sizes` in the upper left of `padded`, zeros around them."""
    batch = torch.zeros((len(images), 3, *padded), device=device)
    mean = torch.tensor(recipe.pixel_mean, device=device)
    std = torch.tensor(recipe.pixel_std, device=device)
    for place, image, size in zip(batch, images, sizes, strict=True):
        pixels = torch.from_numpy(_writable(image)).to(device)  # (H, W, 3)
        if recipe.channel_order == "BGR":
            pixels = pixels.flip(-1)
        if recipe.resize == "detectron2":
            pixels = pillow_resize(pixels, size)
        values = pixels.float().div_(recipe.pixel_range).sub_(mean).div_(std).permute(2, 0, 1)  # (3, H, W)
        if recipe.resize == "torchvision":
            values = F.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]
        place[:, : size.height, : size.width] = values
    return batch


def _writable(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """torch takes neither negative strides nor, without a warning, read-only memory."""
    return np.require(image, requirements=["C", "W"])

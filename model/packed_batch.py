"""A batch as it travels from the processes that load it to a GPU: bytes of pixels and bits of masks, nothing resized.

Of a photograph of 640×480 with ten objects that is 1.3 MB in place of the 19 MB that `ground_truth.collate` makes of it
for an input of 800×1066. On the GPU one launch lays out the pixels; masks stay as they are, and what is
learnt of them is cut from their bits.
"""

# N images, B bytes, G objects of an image, H and W its sides.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.ground_truth import Frames, GroundTruth, TrainingBatch, collate, frames_of, objects_of
from model.kernels import run_kernels_on
from model.mask_targets import PackedMasks, to_bitmaps
from model.recipe import Recipe
from model.structures import ImageSize
from model.transfers import to_device

FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """N images and their objects."""

    objects: TrainingBatch
    """Without pixels and masks."""
    frames: Frames
    pixel_bytes: Tensor
    """(B,) uint8: RGB images (H, W, 3), one after the other."""
    mask_bits: Tensor | None
    """(B,) uint8: bitmaps (G, H, W), eight pixels in a byte, those of each image beginning with a byte."""
    num_objects: list[int]
    recipe: Recipe

    def to(self, device: torch.device) -> TrainingBatch:
        """What `collate` makes of the same, there; pixels are rounded in another order, and masks stay packed."""
        masks = None
        if self.mask_bits is not None:
            sizes = list(zip(self.frames.sizes, self.frames.to_sizes, strict=True))
            masks = PackedMasks(to_device(self.mask_bits, device), self.num_objects, sizes)
        return replace(self.objects.to(device), pixels=self._pixels(device), masks=masks)

    def _pixels(self, device: torch.device) -> Tensor:
        from model.kernels.input_pixels import lay_out

        ends = np.cumsum([0, *(3 * size.height * size.width for size in self.frames.sizes)])
        pixels = torch.empty(
            (len(self.num_objects), 3, *self.frames.padded), device=device, memory_format=torch.channels_last
        )
        lay_out(
            to_device(self.pixel_bytes, device),
            to_device(torch.from_numpy(ends[:-1]), device),
            to_device(torch.tensor(self.frames.sizes), device),
            to_device(torch.tensor(self.frames.to_sizes), device),
            pixels,
            recipe=self.recipe,
        )
        return pixels


def is_for(device: torch.device, recipe: Recipe) -> bool:
    """Whether batches can travel so."""
    return run_kernels_on(device) and recipe.resize == "torchvision"


def pack(
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[GroundTruth],
    *,
    config: ModelConfig,
    recipe: Recipe,
    to_sizes: Sequence[ImageSize] | None = None,
    padded: ImageSize | None = None,
    seeds: Sequence[int] | None = None,
) -> PackedBatch | TrainingBatch:
    """As `collate`; what that makes where it is less, of images four times as large as the input."""
    frames = frames_of(images, truths, config=config, recipe=recipe, to_sizes=to_sizes, padded=padded)
    if sum(image.nbytes for image in images) > 3 * FLOAT_BYTES * len(images) * math.prod(frames.padded):
        return collate(images, truths, config=config, recipe=recipe, to_sizes=to_sizes, padded=padded, seeds=seeds)
    bits = None
    if config.mask_head != "none":
        packed = [np.packbits(_bitmaps(truth, size)) for truth, size in zip(truths, frames.sizes, strict=True)]
        bits = torch.from_numpy(np.concatenate(packed))
    return PackedBatch(
        objects=objects_of(truths, frames, config=config, seeds=seeds),
        frames=frames,
        pixel_bytes=torch.from_numpy(np.concatenate([image.ravel() for image in images])),
        mask_bits=bits,
        num_objects=[len(truth.boxes) for truth in truths],
        recipe=recipe,
    )


def _bitmaps(truth: GroundTruth, size: ImageSize) -> NDArray[np.uint8]:
    """(G, H, W) of masks that are bitmaps or run lengths."""
    masks = truth.masks
    assert masks is not None
    if len(truth.boxes) == 0:
        return np.zeros((0, *size), dtype=np.uint8)
    if not isinstance(masks, Tensor) and not isinstance(masks[0], dict):
        raise ValueError("masks must be bitmaps or run lengths to be packed, got polygons; use collate")
    bitmaps = to_bitmaps(masks).numpy()  # type: ignore[arg-type]
    if bitmaps.shape[1:] != tuple(size):
        raise ValueError(f"masks must have the size of their image {size}, got {bitmaps.shape[1:]}")
    return bitmaps

"""A batch as it travels from the processes that load it to a GPU: bytes of pixels and bits of masks, nothing resized.

Of a photograph of 640×480 with ten objects that is 1.3 MB in place of the 23 MB that `ground_truth.collate` makes of it
for an input of 800×1066. On the GPU one launch lays out the pixels, and a few for each image its masks.
"""

# N images, B bytes, G objects of an image, H and W its sides.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.ground_truth import Frames, GroundTruth, TrainingBatch, frames_of, objects_of
from model.kernels import run_kernels_on
from model.mask_targets import Masks, resized, to_bitmaps
from model.recipe import Recipe
from model.structures import ImageSize


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
        """What `collate` makes of the same, there; pixels are rounded in another order."""
        masks = None if self.mask_bits is None else self._masks(self.mask_bits.to(device))
        return replace(self.objects.to(device), pixels=self._pixels(device), masks=masks)

    def _pixels(self, device: torch.device) -> Tensor:
        from model.kernels.input_pixels import lay_out

        ends = np.cumsum([0, *(3 * size.height * size.width for size in self.frames.sizes)])
        pixels = torch.empty(
            (len(self.num_objects), 3, *self.frames.padded), device=device, memory_format=torch.channels_last
        )
        lay_out(
            self.pixel_bytes.to(device),
            torch.from_numpy(ends[:-1]).to(device),
            torch.tensor(self.frames.sizes).to(device),
            torch.tensor(self.frames.to_sizes).to(device),
            pixels,
            recipe=self.recipe,
        )
        return pixels

    def _masks(self, mask_bits: Tensor) -> list[Masks]:
        """(G, H, W) uint8 of each image, at the size it has in the input."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask_bits.device)
        bits = ((mask_bits[:, None] >> shifts) & 1).flatten()
        masks: list[Masks] = []
        begin = 0
        for count, size, to_size in zip(self.num_objects, *self.frames[:2], strict=True):
            num_pixels = count * size.height * size.width
            bitmaps = bits[begin : begin + num_pixels].view(count, *size)
            masks.append(resized(bitmaps, size, to_size))
            begin += -(-num_pixels // 8) * 8
        return masks


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
) -> PackedBatch:
    """As `collate`, but for masks that are polygons."""
    frames = frames_of(images, truths, config=config, recipe=recipe, to_sizes=to_sizes, padded=padded)
    bits = None
    if config.mask_head != "none":
        packed = [np.packbits(to_bitmaps(truth.masks).numpy()) for truth in truths]  # type: ignore[arg-type]
        bits = torch.from_numpy(np.concatenate(packed))
    return PackedBatch(
        objects=objects_of(truths, frames, config=config, seeds=seeds),
        frames=frames,
        pixel_bytes=torch.from_numpy(np.concatenate([image.ravel() for image in images])),
        mask_bits=bits,
        num_objects=[len(truth.boxes) for truth in truths],
        recipe=recipe,
    )

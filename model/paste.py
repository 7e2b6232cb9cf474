"""Paste: where the M × M mask of a detection lies in its image.

In: mask probabilities and boxes in the image frame. Out: the probability of every pixel near the box, or the affine map
that rle.py needs to find the outline without visiting the pixels. Never a bitmap of the whole image.

Both rules surround the mask with one cell of zeros and interpolate linearly between cell centres; they differ in where
the cells fall. "torchvision" (models/detection/roi_heads.py) widens the box by (M + 2) / M, truncates it to whole
pixels and resizes the padded mask to it. "detectron2" (layers/mask_ops.py) keeps the box continuous and samples at
pixel centres.
"""

# D detections, M mask side, K = M + 2 knots: the cell centres of the padded mask along one axis.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.structures import ImageSize

PasteRule = Literal["torchvision", "detectron2"]


@dataclass(frozen=True, kw_only=True)
class PasteAxis:
    """One axis of D pasted masks: pixel p of the image lies at knot ``(p + shift) * scale - offset``, clipped at 0."""

    start: NDArray[np.int64]
    """(D,) first pixel of the image that the mask may touch."""
    stop: NDArray[np.int64]
    """(D,) one past the last; equal to start where the mask lies outside the image."""
    shift: NDArray[np.float32]
    """(D,) pixels from the centre of pixel 0 of the image to the origin of the map."""
    scale: NDArray[np.float32]
    """(D,) knots per pixel."""
    offset: float
    """Knots from the origin of the map back to the centre of knot 0."""

    def knots(self, detection: NDArray[np.int64], pixel: NDArray[np.int64]) -> NDArray[np.float32]:
        """Position among the knots of pixels, each of the detection beside it."""
        position = (pixel.astype(np.float32) + self.shift[detection]) * self.scale[detection] - np.float32(self.offset)
        clipped: NDArray[np.float32] = np.maximum(position, np.float32(0))
        return clipped

    def pixels(self, detection: NDArray[np.int64], knot: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inverse of ``knots``, in float64: fractional pixels of the image."""
        return (knot + self.offset) / self.scale[detection] - self.shift[detection]


def paste_axes(
    boxes: NDArray[np.float32], mask_side: int, size: ImageSize, paste: PasteRule
) -> tuple[PasteAxis, PasteAxis]:
    """The y and x axes of masks pasted by ``paste`` into boxes (D, 4) of an image of ``size``."""
    axis = _torchvision_axis if paste == "torchvision" else _detectron2_axis
    boxes = np.where(np.isfinite(boxes).all(axis=1, keepdims=True), boxes, np.float32(-1e6))  # far outside
    return (
        axis(boxes[:, 1], boxes[:, 3], mask_side, size.height),
        axis(boxes[:, 0], boxes[:, 2], mask_side, size.width),
    )


def pad_masks(mask_logits: Tensor) -> NDArray[np.float32]:
    """Probabilities of (D, M, M) logits within one cell of zeros: (D, K, K). NaN counts as zero."""
    probabilities = mask_logits.detach().float().sigmoid().nan_to_num(0.0)
    padded: NDArray[np.float32] = F.pad(probabilities, (1, 1, 1, 1)).cpu().numpy()
    return padded


def paste_probabilities(
    mask_logits: Tensor, boxes: Tensor, size: ImageSize, *, paste: PasteRule = "torchvision"
) -> list[tuple[NDArray[np.float32], tuple[int, int]]]:
    """For each detection the probabilities (h, w) of a piece of the image, and the (y, x) where the piece begins."""
    padded = pad_masks(mask_logits)
    y_axis, x_axis = paste_axes(boxes.detach().float().cpu().numpy(), mask_logits.shape[-1], size, paste)
    pieces = []
    for detection, knots in enumerate(padded):
        rows = _interpolation(y_axis, detection, len(knots))  # (h, K)
        columns = _interpolation(x_axis, detection, len(knots))  # (w, K)
        piece = rows @ (knots @ columns.T)  # (h, w)
        pieces.append((piece, (int(y_axis.start[detection]), int(x_axis.start[detection]))))
    return pieces


def _interpolation(axis: PasteAxis, detection: int, num_knots: int) -> NDArray[np.float32]:
    """(pixels, K) weights of each knot for each pixel of the detection's piece."""
    pixel = np.arange(axis.start[detection], axis.stop[detection])
    position = axis.knots(np.full_like(pixel, detection), pixel)
    weight: NDArray[np.float32] = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(num_knots, dtype=np.float32)))
    return weight


def _torchvision_axis(low: NDArray[np.float32], high: NDArray[np.float32], mask_side: int, length: int) -> PasteAxis:
    # Step by step as expand_boxes, to(int64) and paste_mask_in_image do it: the order decides how float32 rounds.
    num_knots = mask_side + 2
    half_width = (high - low) * np.float32(0.5) * np.float32(num_knots / mask_side)
    centre = (high + low) * np.float32(0.5)
    first = np.trunc(centre - half_width)
    last = np.trunc(centre + half_width)
    extent = np.maximum(last - first + 1, 1)
    start = np.clip(first, 0, length).astype(np.int64)
    stop = np.clip(last + 1, start, length).astype(np.int64)
    scale = (np.float32(num_knots) / extent).astype(np.float32)
    return PasteAxis(start=start, stop=stop, shift=np.float32(0.5) - first, scale=scale, offset=0.5)


def _detectron2_axis(low: NDArray[np.float32], high: NDArray[np.float32], mask_side: int, length: int) -> PasteAxis:
    extent = high - low
    visible = extent > 0
    scale = (np.float32(mask_side) / np.where(visible, extent, np.float32(1))).astype(np.float32)
    # Knot 0 is the cell of zeros half a cell before the box: a pixel centre beyond it is zero.
    margin = np.float32(0.5) / scale
    start = np.clip(np.floor(low - margin), 0, length).astype(np.int64)
    stop = np.clip(np.ceil(high + margin), start, length).astype(np.int64)
    return PasteAxis(
        start=start, stop=np.where(visible, stop, start), shift=np.float32(0.5) - low, scale=scale, offset=-0.5
    )

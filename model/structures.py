"""The records that cross the model's border, and the conventions every file of this package keeps.

- boxes: float32 ``(x1, y1, x2, y2)``, pixels, continuous coordinates, so width is ``x2 - x1``, never plus one;
- sizes: ``ImageSize(height, width)``, never a bare pair;
- pixels: uint8 RGB ``(H, W, 3)`` up to ``model/transform.py``, float ``(3, H, W)`` after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray


class ImageSize(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


def sizes_of(images: Sequence[NDArray[np.uint8]]) -> list[ImageSize]:
    """Of arrays (H, W, 3)."""
    return [ImageSize(*image.shape[:2]) for image in images]


class Rle(TypedDict):
    """A binary mask as COCO's compressed run-length string (column-major, zeros first)."""

    size: list[int]
    """[height, width] of the image the mask lies in."""
    counts: bytes


@dataclass(frozen=True, kw_only=True)
class Detections:
    """The D detections of one image, best score first, in the frame of the image as it was given."""

    size: ImageSize
    """Of the image."""
    boxes: NDArray[np.float32]
    """(D, 4) x1 y1 x2 y2."""
    scores: NDArray[np.float32]
    """(D,) in 0..1."""
    category_ids: NDArray[np.int64]
    """(D,) the weights' own ids, background excluded."""
    categories: list[str]
    """D names, one for each detection."""
    masks: list[Rle]
    """D masks; empty for a model without a mask head."""
    areas: NDArray[np.int64]
    """(D,) pixels set in each mask."""
    keypoints: NDArray[np.float32] | None = None
    """(D, K, 3) x, y, score; None for a model without a keypoint head."""

    def __len__(self) -> int:
        return len(self.scores)

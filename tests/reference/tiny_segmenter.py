"""A segmenter that needs no network: one instance per bright image, its box and mask worked out from the pixels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.structures import Detections, ImageSize, Rle


@dataclass(frozen=True, kw_only=True)
class TinySegmenter:
    """The pixels brighter than the image's mean are its instance."""

    batch_size: int = 4
    seconds_per_batch: float = 0.0

    def padded_size(self, size: ImageSize) -> ImageSize:
        return size

    def detect(
        self, images: Sequence[NDArray[np.uint8]], score_threshold: float, *, sizes: Sequence[ImageSize]
    ) -> Sequence[NDArray[np.uint8]]:
        time.sleep(self.seconds_per_batch)
        return images

    def encode(self, raw: Sequence[NDArray[np.uint8]], score_threshold: float) -> list[Detections]:
        return [_bright_part(image) for image in raw]


def _bright_part(image: NDArray[np.uint8]) -> Detections:
    grey = image.mean(axis=2)
    bright = grey > grey.mean()
    rows, columns = np.nonzero(bright)
    count = int(bright.any())
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if count else []
    rle: Rle = coco_mask.encode(np.asfortranarray(bright, np.uint8))
    return Detections(
        size=ImageSize(*image.shape[:2]),
        boxes=np.array(box, np.float32).reshape(count, 4),
        scores=np.full(count, grey.mean() / 255, np.float32),
        category_ids=np.ones(count, np.int64),
        categories=["bright"] * count,
        masks=[rle] * count,
        areas=np.full(count, bright.sum(), np.int64),
    )


@dataclass(frozen=True, kw_only=True)
class CrampedSegmenter(TinySegmenter):
    """Has device memory for one image only."""

    def detect(
        self, images: Sequence[NDArray[np.uint8]], score_threshold: float, *, sizes: Sequence[ImageSize]
    ) -> Sequence[NDArray[np.uint8]]:
        if len(images) > 1:
            raise torch.OutOfMemoryError("no room")
        return images


def load_tiny() -> TinySegmenter:
    return TinySegmenter()


def load_slow() -> TinySegmenter:
    return TinySegmenter(batch_size=1, seconds_per_batch=0.05)


def load_cramped() -> TinySegmenter:
    return CrampedSegmenter()


def load_broken() -> TinySegmenter:
    raise ValueError("these weights are broken")

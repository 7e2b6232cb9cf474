"""What a run needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.structures import Detections, ImageSize

Pixels = NDArray[np.uint8]


class Segmenter(Protocol):
    """What an actor needs of a model. ``model.MaskRCNN`` is one."""

    @property
    def batch_size(self) -> int:
        """Images of one padded size in a batch."""

    def padded_size(self, size: ImageSize) -> ImageSize:
        """The input size of an image; images of one batch share it."""

    def detect(self, images: Sequence[Pixels], score_threshold: float, *, sizes: Sequence[ImageSize]) -> Any:
        """The device's part: pixels (H, W, 3) uint8 in, something that ``encode`` takes out. Of the images `sizes` the
        pixels may be smaller versions."""

    def encode(self, raw: Any, score_threshold: float) -> list[Detections]:
        """The host's part, one Detections for each image."""

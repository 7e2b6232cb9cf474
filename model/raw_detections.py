"""What the device hands over for one batch (`RawDetections`), and the host's part: masks into run lengths."""

# N images, D detections of an image, M mask side, K keypoints.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.recipe import Recipe
from model.rle import encode_detections
from model.structures import Detections, ImageSize, Rle


class MaskTexts(NamedTuple):
    """The masks of a batch that the device has encoded itself."""

    text: Tensor
    """(capacity,) uint8: COCO's strings of all N D places end to end."""
    ends: Tensor
    """(N D,) int64: where each string ends in `text`. A place that is not filled has an empty one."""
    areas: Tensor
    """(N D,) int64: pixels set."""
    needed: Tensor
    """(2,) int64: how many runs and bytes there were to write. Where there are more runs than their capacity, the bytes
    are those of the masks whose runs found room."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What a device still works on, and what it takes to do it again."""

    done: torch.cuda.Event
    """Before it the tensors hold nothing."""
    uncertain: Tensor
    """(U,) bool, none of them set if the fixed shapes held everything that matters."""
    images: Sequence[NDArray[np.uint8]]
    score_threshold: float

    def is_certain(self) -> bool:
        """Wait; whether the detections are those that shapes of any size would give."""
        self.done.synchronize()
        return not self.uncertain.any()


@dataclass(frozen=True, kw_only=True)
class RawDetections:
    """What the device hands over for one batch; D places an image, best first, the empty ones zero."""

    sizes: list[ImageSize]
    """Of the N images as they were given."""
    boxes: Tensor
    """(N, D, 4) float32 in the image's frame."""
    scores: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N, D) class indices."""
    valid: Tensor
    """(N, D) whether the place is filled."""
    mask_logits: Tensor | None
    """(N, D, M, M) float32 of the detection's own class; None without a mask head, or where they are encoded."""
    keypoints: Tensor | None = None
    """(N, D, K, 3) float32 x, y in the image's frame and score; None without a keypoint head."""
    mask_texts: MaskTexts | None = None
    """The masks, where the device has encoded them."""
    pending: Pending | None = None
    """What to wait for before anything is read; None where all is there."""


def encode(
    raw: RawDetections, score_threshold: float, *, recipe: Recipe, categories: Mapping[int, str]
) -> list[Detections]:
    """The detections of each image that score above the threshold.

    By NumPy: around each of torch's small operations any thread of the process may run, and so for each this one waits.
    """
    wanted = raw.valid.numpy() & (raw.scores.numpy() > score_threshold)  # (N, D)
    strings = [] if raw.mask_texts is None else strings_of(raw.mask_texts)
    return [
        _encode_image(raw, index, places.nonzero()[0], strings, recipe=recipe, categories=categories)
        for index, places in enumerate(wanted[: len(raw.sizes)])
    ]


def _encode_image(
    raw: RawDetections,
    index: int,
    kept: NDArray[np.intp],
    strings: Sequence[bytes],
    *,
    recipe: Recipe,
    categories: Mapping[int, str],
) -> Detections:
    """Those at the places `kept` (d,); `strings` are of all places of the batch, where the device has encoded them."""
    size, boxes, labels = raw.sizes[index], raw.boxes.numpy()[index, kept], raw.labels.numpy()[index, kept]
    masks: list[Rle] = []
    areas: NDArray[np.int64] = np.zeros(len(kept), dtype=np.int64)
    if raw.mask_texts is not None:
        sides, places = list(size), index * raw.valid.shape[1] + kept
        masks = [Rle(size=sides, counts=strings[place]) for place in places.tolist()]
        areas = raw.mask_texts.areas.numpy()[places]
    elif raw.mask_logits is not None:
        masks, areas = encode_detections(
            raw.mask_logits[index, kept],
            torch.from_numpy(boxes),
            size,
            threshold=recipe.mask_threshold,
            paste=recipe.paste,
        )
    return Detections(
        size=size,
        boxes=boxes,
        scores=raw.scores.numpy()[index, kept],
        category_ids=labels.astype(np.int64, copy=False),
        categories=[categories[label] for label in labels.tolist()],
        masks=masks,
        areas=areas,
        keypoints=None if raw.keypoints is None else raw.keypoints.numpy()[index, kept],
    )


def strings_of(texts: MaskTexts) -> list[bytes]:
    """The string of each of the N D places."""
    ends = texts.ends.tolist()
    text = texts.text[: ends[-1] if ends else 0].numpy().tobytes()
    return [text[begin:end] for begin, end in pairwise([0, *ends])]

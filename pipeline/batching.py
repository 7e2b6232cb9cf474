"""Decoded images in, batches of one padded shape out, with a bound on the bytes that wait for company."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.structures import ImageSize


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """One image on its way to the model."""

    index: int
    """Its row among the shard's items."""
    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, oriented; of a size of its own where it was decoded shrunk."""
    size: ImageSize
    """Of the image."""
    orientation: int
    num_bytes: int
    """Encoded size."""


def batches(
    images: Iterable[DecodedImage],
    *,
    batch_size: int,
    shape_of: Callable[[DecodedImage], Hashable],
    max_waiting_bytes: int,
) -> Iterator[list[DecodedImage]]:
    """Group images by shape, in the order in which groups fill.

    A group leaves when it holds ``batch_size`` images. When more than ``max_waiting_bytes`` wait in unfinished groups,
    the largest group leaves as it is, so that rare shapes bound memory rather than hold it.
    """
    waiting: dict[Hashable, list[DecodedImage]] = defaultdict(list)
    waiting_bytes = 0
    for image in images:
        group = waiting[shape_of(image)]
        group.append(image)
        waiting_bytes += image.pixels.nbytes
        if len(group) == batch_size:
            full = group
        elif waiting_bytes > max_waiting_bytes:
            full = max(waiting.values(), key=_num_bytes)
        else:
            continue
        waiting_bytes -= _num_bytes(full)
        del waiting[shape_of(full[0])]
        yield full
    yield from waiting.values()


def _num_bytes(group: list[DecodedImage]) -> int:
    return sum(image.pixels.nbytes for image in group)

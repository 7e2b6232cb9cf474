"""COCO's run-length strings, one pixel and one character after the other (cocoapi common/maskApi.c)."""

import numpy as np
from numpy.typing import NDArray


def runs(mask: NDArray[np.bool_]) -> list[int]:
    """Runs of zeros and ones in turn, zeros first, down the columns of a mask (H, W)."""
    counts, current, count = [], False, 0
    for pixel in mask.T.ravel():
        if pixel != current:
            counts.append(count)
            current, count = bool(pixel), 0
        count += 1
    return [*counts, count]


def to_string(counts: list[int]) -> bytes:
    """maskApi.c rleToString."""
    text = bytearray()
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            character = value & 0x1F
            value >>= 5
            more = value != -1 if character & 0x10 else value != 0
            text.append((character | 0x20 if more else character) + 48)
    return bytes(text)


def encode(mask: NDArray[np.bool_]) -> bytes:
    """The string of a mask (H, W)."""
    return to_string(runs(mask))

"""EXIF orientation: read from an Exif block, and applied to pixels.

A stored picture is shown upright by one of eight moves, numbered 1 to 8: mirror left to right for 2, 3, 6 and 7; top to
bottom for 3, 4, 7 and 8; for 5 to 8 after swapping rows and columns.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

_TAG = 0x0112
_MAX_PNG_CHUNKS = 100_000  # walked in search of an Exif block


def exif_orientation(exif: bytes) -> int:
    """Of the first directory; 1 when absent or invalid, for a broken block must not cost the image."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == _TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def late_png_exif(data: bytes) -> bytes:
    """A PNG may carry its eXIf chunk behind the pixels, where reading the header does not reach."""
    at = 8  # behind the signature
    for _ in range(_MAX_PNG_CHUNKS):
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if name == b"eXIf":
            return data[at + 8 : at + 8 + length]
        if name in (b"IEND", b""):
            break
        at += 12 + length  # length, name, body, checksum
    return b""


def oriented(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The upright picture, contiguous; ``pixels`` itself when they are that already."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    right = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::down, ::right])

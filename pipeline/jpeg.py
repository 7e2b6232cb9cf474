"""What a JPEG says of itself, read from its markers, and whether its data reaches its last block.

The markers are walked here rather than by Pillow, which also parses the Exif block for a resolution and warns of each
one that is broken, and costs twice as much.
"""

from __future__ import annotations

import re
import struct
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from model.structures import ImageSize
from pipeline.errors import DecodeError

END = b"\xff\xd9"

_MARKER = re.compile(rb"\xff[\x01-\xfe]")  # ff 00 is data, ff ff is fill
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, restarts, start of image: no length follows
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # not DHT, JPG, DAC
_READ_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})  # baseline, extended, progressive; the last two arithmetic
_SCAN, _EXIF, _END = 0xDA, 0xE1, 0xD9
_MAX_SEGMENTS = 10_000
_LUMA = np.array([0.299, 0.587, 0.114])


class Frame(NamedTuple):
    """The header of the picture."""

    size: ImageSize
    num_components: int
    exif: bytes
    """The Exif block, empty if there is none."""


def read_frame(data: bytes) -> Frame:
    """Walk the markers up to the first scan."""
    at, frame, exif = 2, b"", b""
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, at)
        if match is None:
            raise DecodeError("truncated", "JPEG: the header does not end")
        marker, at = data[match.end() - 1], match.end()
        if marker in _BARE_MARKERS:
            continue
        if marker in (_SCAN, _END):
            return _parse(frame, exif)
        length = int.from_bytes(data[at : at + 2], "big")
        if marker in _FRAMES:
            frame = bytes([marker]) + data[at + 2 : at + length]
        elif marker == _EXIF and not exif and data.startswith(b"Exif\0\0", at + 2):
            exif = data[at + 2 : at + length]
        at += length
    raise DecodeError("unreadable", f"JPEG: more than {_MAX_SEGMENTS} segments before the first scan")


def _parse(frame: bytes, exif: bytes) -> Frame:
    if len(frame) < 7:
        raise DecodeError("unreadable", "JPEG: no frame before the first scan")
    marker, precision, height, width, num_components = struct.unpack_from(">BBHHB", frame)
    if marker not in _READ_FRAMES or precision != 8 or num_components not in (1, 3, 4):
        kind = f"process {marker:#x}, {precision} bits, {num_components} components"
        raise DecodeError("unsupported", f"JPEG: {kind} are not read")
    if height == 0 or width == 0:
        raise DecodeError("unreadable", f"JPEG: {width}x{height} pixels")
    return Frame(ImageSize(height, width), num_components, exif)


def lacks_last_block(data: bytes, pixels: NDArray[np.uint8], shrink: int = 1) -> bool:
    """An end marker behind cut data: the decoder paints the rest grey and only prints a warning. `pixels` as stored, or
    shrunk.

    Grey at the end is suspicious, not more. The proof is that further bits before the end marker would change the
    picture; a complete one does not look at them. Pillow does not print.
    """
    height, width, _ = pixels.shape
    side = 8 // shrink
    last_block = pixels[(height - 1) // side * side :, (width - 1) // side * side :]
    if (np.abs(last_block @ _LUMA - 128) > 1.5).any():
        return False
    at = data.rfind(END)
    longer = data[:at].rstrip(b"\xff") + bytes(range(1, 128)) * 2 + data[at:]  # ff before it would make a marker
    return JpegImageFile(BytesIO(data)).tobytes() != JpegImageFile(BytesIO(longer)).tobytes()

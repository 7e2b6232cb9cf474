"""EXIF orientation: applied once, in every format, wherever the block lies; ignored when broken."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.structures import ImageSize
from pipeline.decode import decode, inspect
from pipeline.orientation import exif_orientation
from tests.pipeline.bad_images import (
    JPEG_LOSS,
    LIMITS,
    PICTURE,
    SIZE,
    UPRIGHT,
    encode_jpeg,
    encode_oriented,
    encode_png,
    far,
    png_chunk,
    read,
)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_shows_the_same_picture(image_format: str, orientation: int) -> None:
    options: dict[str, Any] = {"quality": 97, "subsampling": 0} if image_format == "JPEG" else {}
    if image_format == "WEBP":
        options = {"lossless": True}
    data = encode_oriented(PICTURE, image_format, orientation, **options)
    header = inspect(data, LIMITS)
    turned = orientation >= 5
    assert header.orientation == orientation
    assert header.size == (ImageSize(SIZE.width, SIZE.height) if turned else SIZE)
    assert far(decode(data, header), UPRIGHT) <= (JPEG_LOSS if image_format == "JPEG" else 0)


def test_orientation_behind_the_pixels_of_a_png_counts() -> None:
    exif = b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    stored = np.rot90(UPRIGHT)  # to the left; 6 turns to the right
    data = encode_png(stored, colour_type=2)
    data = data[:-12] + png_chunk(b"eXIf", exif) + data[-12:]
    assert inspect(data, LIMITS).orientation == 6
    assert np.array_equal(read(data), UPRIGHT)


@given(st.binary(max_size=200))
def test_a_broken_exif_block_means_upright(block: bytes) -> None:
    assert exif_orientation(b"Exif\0\0MM\0*" + block) in range(1, 9)
    assert exif_orientation(block) in range(1, 9)


def test_orientation_out_of_range_means_upright() -> None:
    for wrong in (0, 9, 65535):
        exif = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHIHH", 0x0112, 3, 1, wrong, 0)
        assert inspect(encode_jpeg(PICTURE, exif=b"Exif\0\0" + exif), LIMITS).orientation == 1

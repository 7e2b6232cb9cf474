"""Hand-made image files that archives really hold, good ones of odd kinds and broken ones, with what must come of each.

All pictures are ``PICTURE`` in some disguise, so a test can compare pixels too. Nothing is read from disk.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.structures import ImageSize
from pipeline.decode import DecodeLimits, decode, inspect
from pipeline.errors import Reason

Outcome = tuple[Literal["ok", "failed"], Reason | None, ImageSize | None]
"""Status, reason if failed, oriented size if ok."""

SIZE = ImageSize(40, 60)
_OK: Outcome = ("ok", None, SIZE)

_FLIPS = {  # what turns the upright picture into the stored one, by EXIF orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def draw_picture() -> Image.Image:
    """Smooth, so that JPEG keeps it, and without any symmetry, so that a wrong orientation shows."""
    y, x = np.mgrid[0 : SIZE.height, 0 : SIZE.width].astype(np.float64)
    red, green, blue = 255 * x / SIZE.width, 255 * y / SIZE.height, 60 + 120 * (x > 40) * (y < 20)
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))


PICTURE = draw_picture()
UPRIGHT: NDArray[np.uint8] = np.asarray(PICTURE)
LIMITS = DecodeLimits()
JPEG_LOSS = 8  # levels, by encode_jpeg


def read(data: bytes, limits: DecodeLimits = LIMITS) -> NDArray[np.uint8]:
    """As the pipeline does: inspected, then decoded."""
    return decode(data, inspect(data, limits))


def far(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    """The largest difference of two pictures of one size, in levels."""
    assert first.shape == second.shape
    return int(np.abs(first.astype(int) - second).max())


def make_bad_images(folder: Path) -> dict[str, Outcome]:
    """Write all files into ``folder``; the expected outcome of each, by file name."""
    files = {**_odd_files(), **_oriented_files(), **_broken_files()}
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: outcome for name, (_, outcome) in files.items()}


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """The bytes Pillow writes."""
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, **options: Any) -> bytes:
    """With little loss: tests compare pixels."""
    return encode(image, "JPEG", quality=97, subsampling=0, **options)


def encode_oriented(image: Image.Image, image_format: str, orientation: int, **options: Any) -> bytes:
    """A file that shows ``image`` once its EXIF orientation is applied."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    flip = _FLIPS[orientation]
    stored = image if flip is None else image.transpose(flip)
    return encode(stored, image_format, exif=exif, **options)


def encode_png(samples: NDArray[np.uint8] | NDArray[np.uint16], *, colour_type: int, chunks: bytes = b"") -> bytes:
    """A PNG of (H, W, channels) samples of 8 or 16 bits, for what Pillow cannot write."""
    height, width, _ = samples.shape
    rows = samples.astype(">u2" if samples.dtype == np.uint16 else np.uint8)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * rows.itemsize, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Length, name, body, checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _odd_files() -> dict[str, tuple[bytes, Outcome]]:
    """Whole files of kinds that a decoder for 8-bit RGB trips over."""
    grey = PICTURE.convert("L")
    ramp = Image.linear_gradient("L").resize((SIZE.width, SIZE.height))
    rgba = PICTURE.copy()
    rgba.putalpha(ramp)
    grey_alpha = Image.merge("LA", (grey, ramp))
    palette = PICTURE.quantize(64)
    unit = np.asarray(grey, dtype=np.float32) / 255
    images = {
        "plain.jpg": encode_jpeg(PICTURE),
        "progressive.jpg": encode_jpeg(PICTURE, progressive=True),
        "grey.jpg": encode_jpeg(grey),
        "cmyk.jpg": encode_jpeg(PICTURE.convert("CMYK")),
        "trailing_garbage.jpg": encode_jpeg(PICTURE) + b"\0garbage\xff" * 50,
        "upper_case.JPG": encode_jpeg(PICTURE),
        "png_called.jpg": encode(PICTURE, "PNG"),
        "png16.png": encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"),
        "png16_rgb.png": encode_png(np.asarray(PICTURE).astype(np.uint16) * 257, colour_type=2),
        "palette.png": encode(palette, "PNG"),
        "palette_alpha.png": encode(palette, "PNG", transparency=bytes(range(64))),
        "colour_key.png": encode(PICTURE, "PNG", transparency=(0, 0, 60)),
        "rgba.png": encode(rgba, "PNG"),
        "la.png": encode(grey_alpha, "PNG"),
        "one_bit.png": encode(PICTURE.convert("1"), "PNG"),
        "lossy.webp": encode(PICTURE, "WEBP", quality=95),
        "alpha.webp": encode(rgba, "WEBP", lossless=True, exact=True),
        "animated.webp": encode(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[PICTURE.rotate(180)]),
        "animated.gif": encode(palette, "GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
        "bitmap.bmp": encode(PICTURE, "BMP"),
        "float.tiff": encode(Image.fromarray(unit), "TIFF"),
        "sixteen_bits.tiff": encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "TIFF"),
        "lab.tiff": encode(Image.merge("LAB", (grey, *(Image.new("L", grey.size, 128) for _ in "ab"))), "TIFF"),
        "cmyk.tiff": encode(PICTURE.convert("CMYK"), "TIFF", compression="tiff_lzw"),
    }
    return {name: (data, _OK) for name, data in images.items()}


def _oriented_files() -> dict[str, tuple[bytes, Outcome]]:
    files = {
        f"exif_{orientation}.jpg": encode_oriented(PICTURE, "JPEG", orientation, quality=97, subsampling=0)
        for orientation in _FLIPS
    }
    files["exif_6.png"] = encode_oriented(PICTURE, "PNG", 6)
    files["exif_8.webp"] = encode_oriented(PICTURE, "WEBP", 8, lossless=True)
    files["exif_7.tiff"] = encode_oriented(PICTURE, "TIFF", 7)
    return {name: (data, _OK) for name, data in files.items()}


def _broken_files() -> dict[str, tuple[bytes, Outcome]]:
    jpeg, png, webp = encode_jpeg(PICTURE), encode(PICTURE, "PNG"), encode(PICTURE, "WEBP")
    gif, tiff = encode(PICTURE.quantize(64), "GIF"), encode(PICTURE, "TIFF")
    huge = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    at = png.index(b"IDAT") + 20
    precision = jpeg.index(b"\xff\xc0") + 4
    failures: dict[str, tuple[bytes, Reason]] = {
        "empty.jpg": (b"", "empty"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut_in_header.jpg": (jpeg[:100], "truncated"),
        "cut_last_bytes.jpg": (jpeg[:-2], "truncated"),
        "zero_tail.jpg": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "truncated"),
        "ended_early.jpg": (jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9", "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "no_iend.png": (png[:-12], "truncated"),
        "truncated.webp": (webp[:-40], "truncated"),
        "truncated.gif": (gif[: len(gif) // 2], "truncated"),
        "truncated.tiff": (tiff[: len(tiff) // 2], "truncated"),
        "text.jpg": (b"This is not an image.\n" * 20, "unreadable"),
        "error_page.jpg": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "unreadable"),
        "zero_filled.jpg": (bytes(4096), "unreadable"),
        "bad_checksum.png": (png[:at] + bytes([png[at] ^ 0xFF]) + png[at + 1 :], "unreadable"),
        "bomb.png": (png[:8] + huge + png[33:], "too_large"),
        "twelve_bits.jpg": (jpeg[:precision] + b"\x0c" + jpeg[precision + 1 :], "unsupported"),
        "vector.png": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported"),
        "heic.jpg": (struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(64), "unsupported"),
        "document.png": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "unsupported"),
    }
    return {name: (data, ("failed", reason, None)) for name, (data, reason) in failures.items()}

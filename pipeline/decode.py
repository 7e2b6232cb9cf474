"""The bytes of one image in, uint8 RGB pixels in the oriented frame out. Every failure is a DecodeError with a reason.

    inspect(data, limits) -> ImageHeader    type from magic bytes, size and orientation from the header, bounds checked
    decode(data, header)  -> (H, W, 3)      uint8 RGB, contiguous, EXIF orientation applied once

With a header from ``shrunk`` a JPEG is decoded to a half, a quarter or an eighth of its sides, which libjpeg makes of
fewer coefficients in less time; that goes through Pillow.

JPEG and WebP go through torchvision's operators; what those do not take (CMYK, animation) and the other formats go
through Pillow, opened by the one class that the magic bytes name. PNG is among them: on a PNG whose compressed data is
damaged torchvision 0.29 ends the process with SIGSEGV, and it would save but 10 % of the time. Colours follow
``pipeline/colour.py``. All of it may be called from many threads; the decoders do not hold the GIL.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from model.structures import ImageSize
from pipeline.colour import to_rgb
from pipeline.errors import ConfigError, DecodeError, Reason
from pipeline.jpeg import END, lacks_last_block, read_frame
from pipeline.orientation import exif_orientation, late_png_exif, oriented

_OPENERS: dict[str, Callable[[BytesIO], ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
# Classes rather than Image.open(formats=…), which bounds the pixels by the process-wide Image.MAX_IMAGE_PIXELS and
# not by the limits of the caller. That bound stays as Pillow sets it, for what the classes themselves allocate.
if features.check("avif"):
    _OPENERS["AVIF"] = AvifImageFile

JPEG_MAGIC = b"\xff\xd8\xff"
LACKS_LAST_BLOCK = "JPEG: the data ends before the last block, though an end marker follows"

_RGB_MODE = 3  # ImageReadMode.RGB: grey is replicated, alpha dropped

_FORMAT_MAGIC: list[tuple[str, bytes]] = [
    ("JPEG", JPEG_MAGIC),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF....WEBP"),
    ("GIF", rb"GIF8[79]a"),
    ("BMP", rb"BM"),
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    ("AVIF", rb"....ftypavi[fs]"),
    ("HEIC", rb"....ftyp(?:he|mif1|msf1)"),
    ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("PDF", rb"%PDF"),
    ("EPS", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("PSD", rb"8BPS"),
    ("SVG", rb"(?:\xef\xbb\xbf)?\s*<(?:svg|(?:\?xml|!--|!DOCTYPE svg).*?<svg)"),
    ("ICO", rb"\0\0\1\0"),
    ("OpenEXR", rb"v/1\1"),
    ("Radiance HDR", rb"#\?R"),
    ("DDS", rb"DDS "),
    ("QOI", rb"qoif"),
    ("Netpbm", rb"P[1-7]\s"),
    ("DICOM", rb".{128}DICM"),
    ("XCF", rb"gimp xcf"),
]
_MAGIC = re.compile(rb"|".join(b"(%s)" % pattern for _, pattern in _FORMAT_MAGIC), re.DOTALL)
_HTML = re.compile(rb"\s*<(?:!doctype )?html", re.IGNORECASE)
_HEAD = 2048  # bytes in which a signature must show
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_CUT_WORDS = ("truncated", "incomplete", "unexpected end", "end of file", "premature")
_UNSUPPORTED_WORDS = ("cannot handle", "unsupported", "not supported", "unknown compression", "unknown pixel mode")


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What an image may cost before it is refused as too_large."""

    max_image_bytes: int = 256 * 2**20
    """Encoded. Larger objects are refused without being decoded."""

    max_image_pixels: int = 100_000_000
    """Width times height by the header. Three bytes each once decoded, up to twelve while a float TIFF is scaled."""

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What is known of an image before it is decoded."""

    format: str
    """Pillow's name of it: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF."""
    mode: str
    """Pillow's name of the stored colours: RGB, L, P, CMYK, I;16, F, …"""
    size: ImageSize
    """As stored, before orientation."""
    orientation: int
    """EXIF 1..8; 1 when absent or invalid."""
    is_fast: bool
    """Decoded by torchvision rather than by Pillow."""
    shrink: int = 1
    """A JPEG may be decoded to a half, a quarter or an eighth of its sides, none of which is shorter: 2, 4 or 8."""

    @property
    def oriented_size(self) -> ImageSize:
        """Of the image."""
        return ImageSize(self.size.width, self.size.height) if self.orientation >= 5 else self.size

    @property
    def decoded_size(self) -> ImageSize:
        """Of the decoded array."""
        height, width = self.oriented_size
        return ImageSize(-(-height // self.shrink), -(-width // self.shrink))


@functools.cache
def fast_operators() -> dict[str, Callable[..., Any]]:
    """torchvision's, by the format they decode. The first call imports it, for which a command that looks at no image
    need not wait."""
    import torch
    import torchvision.io  # noqa: F401  registers torch.ops.image; its Python functions are deprecated and warn

    return {
        image_format: getattr(torch.ops.image, name)
        for image_format, name in [("JPEG", "decode_jpeg"), ("WEBP", "decode_webp")]
        if hasattr(torch.ops.image, name)  # torchvision means to remove them: Pillow then decodes everything
    }


def inspect(data: bytes, limits: DecodeLimits) -> ImageHeader:
    """Read type, size and orientation and refuse what is empty, foreign or too large; nothing is decoded."""
    if not data:
        raise DecodeError("empty", "0 bytes")
    if len(data) > limits.max_image_bytes:
        raise DecodeError("too_large", f"{len(data)} bytes, more than max_image_bytes={limits.max_image_bytes}")
    image_format = _sniff(data)
    fast_operators()  # here, where that it cannot be imported is not held against the image
    with _mapped_errors(image_format, data):
        header = _jpeg_header(data) if image_format == "JPEG" else _pillow_header(data, image_format)
    height, width = header.size
    if height * width > limits.max_image_pixels:
        raise DecodeError("too_large", f"{width}x{height} pixels, more than max_image_pixels={limits.max_image_pixels}")
    if _is_cut(image_format, data):  # PNG decoders are content without the last chunk
        raise DecodeError("truncated", f"{image_format}: {len(data)} bytes, no end of image")
    return header


def shrunk(header: ImageHeader, wanted: ImageSize) -> ImageHeader:
    """The header of the smallest version of a JPEG whose sides are no shorter than `wanted`; of others as it is."""
    if header.format != "JPEG":
        return header
    height, width = header.oriented_size
    fitting = [shrink for shrink in (8, 4, 2) if height >= shrink * wanted.height and width >= shrink * wanted.width]
    return replace(header, shrink=fitting[0]) if fitting else header


def decode(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    """The (H, W, 3) uint8 RGB pixels of ``header.decoded_size``, contiguous."""
    is_fast = header.is_fast and header.shrink == 1
    with _mapped_errors(header.format, data):
        pixels = _decode_fast(data, header) if is_fast else _decode_with_pillow(data, header)
    if pixels.shape != (*header.decoded_size, 3):
        raise DecodeError("unreadable", f"{header.format}: decoded to {pixels.shape}, header says {header.size}")
    return pixels


def _sniff(data: bytes) -> str:
    head = data[:_HEAD]
    match = _MAGIC.match(head)
    if match is None or match.lastindex is None:
        what = "HTML" if _HTML.match(head) else "zeros" if not head.strip(b"\0") else "no known signature"
        raise DecodeError("unreadable", f"not an image: {what} in {len(data)} bytes")
    image_format = _FORMAT_MAGIC[match.lastindex - 1][0]
    if image_format not in _OPENERS:
        raise DecodeError("unsupported", f"{image_format} images are not read")
    return image_format


def _jpeg_header(data: bytes) -> ImageHeader:
    size, num_components, exif = read_frame(data)
    return ImageHeader(
        format="JPEG",
        mode={1: "L", 3: "RGB", 4: "CMYK"}[num_components],
        size=size,
        orientation=exif_orientation(exif),
        is_fast="JPEG" in fast_operators() and num_components != 4,
    )


def _pillow_header(data: bytes, image_format: str) -> ImageHeader:
    image = _OPENERS[image_format](BytesIO(data))
    width, height = image.size
    if isinstance(image, TiffImageFile):
        width, height = image.tag_v2[256], image.tag_v2[257]  # image.size is already the oriented one
        orientation = image.tag_v2.get(274, 1)
    else:
        late = late_png_exif(data) if image_format == "PNG" else b""
        orientation = exif_orientation(image.info.get("exif", late))
    return ImageHeader(
        format=image_format,
        mode=image.mode,
        size=ImageSize(height, width),
        orientation=orientation if orientation in range(1, 9) else 1,
        is_fast=image_format in fast_operators() and not getattr(image, "is_animated", False),
    )


def _is_cut(image_format: str, data: bytes) -> bool:
    """The bytes stop before the format's own end; more behind it is harmless."""
    if image_format == "JPEG":
        return data.rfind(END) < 0
    if image_format == "PNG":
        return data.rfind(_PNG_END) < 0
    if image_format == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if image_format == "TIFF" and b"*" in data[2:4]:  # its first directory, often written last; + is BigTIFF
        order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
        directory = int.from_bytes(data[4:8], order)
        return len(data) < directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], order)
    return False


def _decode_fast(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    import torch

    # The copy costs 0.2 % of a JPEG's decoding; without it torch warns that bytes are read-only.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    decoded = fast_operators()[header.format](encoded, _RGB_MODE)  # (3, H, W), a view of (H, W, 3)
    pixels: NDArray[np.uint8] = decoded.permute(1, 2, 0).numpy()
    if header.format == "JPEG" and lacks_last_block(data, pixels):
        raise DecodeError("truncated", LACKS_LAST_BLOCK)
    return oriented(pixels, header.orientation)


def _decode_with_pillow(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    image = _OPENERS[header.format](BytesIO(data))  # stands at the first frame
    if header.shrink > 1:
        image.draft(image.mode, (image.width // header.shrink, image.height // header.shrink))
    image.load()
    pixels = to_rgb(image)
    if header.shrink > 1 and lacks_last_block(data, pixels, header.shrink):
        raise DecodeError("truncated", LACKS_LAST_BLOCK)
    return oriented(pixels, 1 if header.format == "TIFF" else header.orientation)  # Pillow has turned a TIFF


@contextmanager
def _mapped_errors(image_format: str, data: bytes) -> Iterator[None]:
    """The one edge at which the decoders' errors become ours."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:  # decoders also raise ValueError, TypeError, SyntaxError, struct.error, IndexError
        message = re.sub(r"^.*\.(cpp|h):\d+, ", "", str(error), flags=re.DOTALL)
        words = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        detail = f"{image_format}: {type(error).__name__}: {words}"
        raise DecodeError(_reason_of(error, image_format, data), detail[:190]) from error


def _reason_of(error: Exception, image_format: str, data: bytes) -> Reason:
    message = str(error).lower()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning | MemoryError):
        return "too_large"
    ran_out = any(isinstance(e, EOFError | IndexError | struct.error) for e in (error, error.__cause__))
    if ran_out or _is_cut(image_format, data) or any(word in message for word in _CUT_WORDS):
        return "truncated"
    return "unsupported" if any(word in message for word in _UNSUPPORTED_WORDS) else "unreadable"

"""Decoding: the outcome of every odd and broken file, limits, threads, and no array from a cut or damaged file."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from model.structures import ImageSize
from pipeline.decode import DecodeLimits, ImageHeader, decode, inspect
from pipeline.errors import ConfigError, DecodeError
from tests.pipeline.bad_images import (
    JPEG_LOSS,
    LIMITS,
    PICTURE,
    SIZE,
    UPRIGHT,
    encode,
    encode_jpeg,
    encode_oriented,
    encode_png,
    far,
    make_bad_images,
    png_chunk,
    read,
)

COCO = Path(os.environ.get("MASKLINE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "coco100" / "images"


def reason_of(data: bytes, limits: DecodeLimits = LIMITS) -> str | None:
    try:
        read(data, limits)
    except DecodeError as error:
        caught = error
    else:
        return None
    assert "\n" not in caught.detail
    assert 0 < len(caught.detail) < 200
    return caught.reason


def test_every_file_has_its_outcome(tmp_path: Path) -> None:
    outcomes = make_bad_images(tmp_path)
    assert sorted(outcomes) == sorted(path.name for path in tmp_path.iterdir())
    assert len(outcomes) >= 24
    for name, (status, reason, size) in outcomes.items():
        data = (tmp_path / name).read_bytes()
        assert reason_of(data) == reason, name
        if status == "ok":
            header = inspect(data, LIMITS)
            pixels = decode(data, header)
            assert header.oriented_size == size == ImageSize(*pixels.shape[:2]), name
            assert (pixels.dtype, pixels.flags.c_contiguous, pixels.flags.writeable) == (
                np.dtype(np.uint8),
                True,
                True,
            ), name


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow is built without AVIF")
def test_avif_is_read() -> None:
    data = encode_oriented(PICTURE, "AVIF", 6, quality=95, subsampling="4:4:4")
    assert far(read(data), UPRIGHT) <= JPEG_LOSS
    assert reason_of(data[:-20]) == "truncated"


# --- limits and errors ---------------------------------------------------------------------------------------------


def test_limits_are_inclusive_and_read_from_the_header() -> None:
    data = encode(PICTURE, "PNG")
    pixels = SIZE.height * SIZE.width
    assert reason_of(data, DecodeLimits(max_image_pixels=pixels, max_image_bytes=len(data))) is None
    assert reason_of(data, DecodeLimits(max_image_pixels=pixels - 1)) == "too_large"
    assert reason_of(data, DecodeLimits(max_image_bytes=len(data) - 1)) == "too_large"
    for image_format in ("JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        with pytest.raises(DecodeError, match="too_large"):
            inspect(encode(PICTURE, image_format), DecodeLimits(max_image_pixels=pixels - 1))


def test_pixel_limit_is_the_callers_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for image_format in ("JPEG", "PNG", "BMP"):
        assert read(encode(PICTURE, image_format)).shape == UPRIGHT.shape
    assert reason_of(encode(PICTURE, "TIFF")) == "too_large"  # what Pillow allocates by itself keeps Pillow's bound


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_image_pixels"):
        DecodeLimits(max_image_pixels=0)
    with pytest.raises(ConfigError, match="max_image_bytes"):
        DecodeLimits(max_image_bytes=-1)


def test_unsupported_types_are_named() -> None:
    for head, name in {
        b"\0\0\0\x18ftypheix\0\0\0\0": "HEIC",
        b"\xef\xbb\xbf<svg ": "SVG",
        b"%PDF-1.4": "PDF",
        b"%!PS-Adobe-3.0 EPSF": "EPS",
        b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
        b"8BPS\0\1": "PSD",
        b"\xff\x0a\0\0": "JPEG XL",
        b"P6\n2 2 255\n": "Netpbm",
    }.items():
        with pytest.raises(DecodeError, match="unsupported") as caught:
            inspect(head + bytes(50), LIMITS)
        assert name in caught.value.detail


def test_a_header_that_lies_is_an_error() -> None:
    data = encode_jpeg(PICTURE)
    wrong = replace(inspect(data, LIMITS), size=ImageSize(SIZE.height + 1, SIZE.width))
    with pytest.raises(DecodeError, match="unreadable"):
        decode(data, wrong)


# --- cuts and noise ------------------------------------------------------------------------------------------------

CUTTABLE = {
    "jpeg": encode_jpeg(PICTURE),
    "progressive": encode(PICTURE, "JPEG", progressive=True),
    "exif_jpeg": encode_oriented(PICTURE, "JPEG", 6),
    "cmyk": encode_jpeg(PICTURE.convert("CMYK")),
    "png": encode(PICTURE, "PNG"),
    "palette": encode(PICTURE.quantize(16), "PNG"),
    "webp": encode(PICTURE, "WEBP"),
    "lossless_webp": encode(PICTURE, "WEBP", lossless=True),
    "animated_webp": encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)]),
    "bmp": encode(PICTURE.resize((12, 8)), "BMP"),
    "tiff": encode(PICTURE.resize((12, 8)), "TIFF"),
}


@pytest.mark.parametrize("name", sorted(CUTTABLE))
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on the directories of a cut TIFF
def test_no_cut_file_gives_an_array(name: str) -> None:
    """Not one byte may lack: the end marker carries no pixels, but its absence shows that something was lost."""
    data = CUTTABLE[name]
    for length in range(len(data)):
        reason = reason_of(data[:length])
        assert reason in ("truncated", "unreadable", "empty"), f"{length} of {len(data)} bytes: {reason}"
        assert reason == "truncated" or length < 64 or name == "tiff", f"{length} of {len(data)} bytes: {reason}"


def test_a_gif_may_only_lack_its_last_two_bytes() -> None:
    """An empty block and the trailer. Everything before them carries pixels."""
    data = encode(PICTURE.quantize(32), "GIF")
    for length in range(20, len(data)):
        if length < len(data) - 2:
            assert reason_of(data[:length]) == "truncated"
        else:
            assert np.array_equal(read(data[:length]), read(data))


@given(st.integers(0, 2**32 - 1), st.integers(8, 90), st.integers(8, 90), st.data())
@settings(max_examples=60, deadline=None)
def test_no_cut_picture_of_any_size_gives_an_array(seed: int, height: int, width: int, data: st.DataObject) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image_format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    whole = encode(Image.fromarray(noise), image_format)
    assert reason_of(whole) is None
    assert reason_of(whole[: data.draw(st.integers(1, len(whole) - 1))]) is not None


@given(st.integers(24, 120), st.integers(24, 120), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_jpeg_closed_too_early_is_truncated(height: int, width: int, grey: bool) -> None:
    """An end marker behind half of the data: libjpeg then paints the rest grey and only prints a warning."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(height * 121 + width).integers(0, 60, (height, width))
    picture = Image.fromarray(np.stack([190 - noise, (x * 2) % 256, (y * 2) % 256], axis=2).astype(np.uint8))
    data = encode(picture.convert("L") if grey else picture, "JPEG", quality=90)
    scan = data.index(b"\xff\xda")
    assert reason_of(data) is None
    assert reason_of(data[: scan + (len(data) - scan) // 2] + b"\xff\xd9") == "truncated"


def test_a_picture_that_ends_in_grey_is_whole() -> None:
    for colour in ((128, 128, 128), (127, 128, 129), (128, 129, 127)):
        for progressive in (False, True):
            data = encode(Image.new("RGB", (50, 50), colour), "JPEG", progressive=progressive)
            assert reason_of(data) is None
    assert reason_of(encode(Image.new("L", (33, 17), 128), "JPEG")) is None


def test_a_png_that_lacks_compressed_data_is_truncated() -> None:
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in UPRIGHT))
    whole = encode_png(UPRIGHT, colour_type=2)
    short = whole.replace(png_chunk(b"IDAT", body), png_chunk(b"IDAT", body[: len(body) // 2]))
    assert len(short) < len(whole)
    assert reason_of(short) == "truncated"


@given(st.binary(max_size=2000))
@settings(deadline=None)
def test_random_bytes_raise_decode_errors_only(data: bytes) -> None:
    assert reason_of(data) is not None


@given(st.sampled_from(sorted(CUTTABLE)), st.binary(max_size=400))
@settings(deadline=None)
def test_noise_behind_a_signature_raises_decode_errors_only(name: str, noise: bytes) -> None:
    assert reason_of(CUTTABLE[name][:24] + noise) is not None


@given(
    st.sampled_from(sorted(CUTTABLE)),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=12),
)
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_raise_decode_errors_only(name: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(CUTTABLE[name])
    for at, value in changes:
        data[int(at * len(data))] = value
    reason_of(bytes(data), DecodeLimits(max_image_pixels=1_000_000))


# --- real pictures -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not COCO.is_dir(), reason="needs coco100 in ../shared/data or MASKLINE_DATA")
def test_photographs_equal_pillow_and_many_threads_equal_one() -> None:
    photographs = [path.read_bytes() for path in sorted(COCO.glob("*.jpg"))[:40]]
    headers = [inspect(data, LIMITS) for data in photographs]
    serial = [decode(data, header) for data, header in zip(photographs, headers, strict=True)]
    with ThreadPoolExecutor(8) as threads:
        parallel = list(threads.map(decode, photographs * 2, headers * 2))
    assert all(np.array_equal(one, many) for one, many in zip(serial * 2, parallel, strict=True))
    by_pillow = [decode(d, replace(h, is_fast=False)) for d, h in zip(photographs[:10], headers[:10], strict=True)]
    assert max(far(one, two) for one, two in zip(serial[:10], by_pillow, strict=True)) <= 4


def test_header_says_what_is_decoded_how() -> None:
    header = inspect(encode_jpeg(PICTURE), LIMITS)
    assert header == ImageHeader(format="JPEG", mode="RGB", size=SIZE, orientation=1, is_fast=True)
    assert not inspect(encode(PICTURE, "PNG"), LIMITS).is_fast


def test_a_decoder_that_cannot_be_imported_is_not_held_against_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libjpeg.so.8: cannot open shared object file")

    monkeypatch.setattr("pipeline.decode.fast_operators", broken)
    with pytest.raises(ImportError, match="libjpeg"):
        inspect(encode(PICTURE, "JPEG"), LIMITS)

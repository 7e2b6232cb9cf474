"""The colour rules, and that all formats follow them alike."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.decode import inspect
from tests.pipeline.bad_images import JPEG_LOSS, LIMITS, PICTURE, UPRIGHT, encode, encode_jpeg, encode_png, far, read


def test_lossless_formats_agree() -> None:
    for data in (
        encode(PICTURE, "PNG"),
        encode(PICTURE, "WEBP", lossless=True),
        encode(PICTURE, "BMP"),
        encode(PICTURE, "TIFF"),
        encode(PICTURE, "TIFF", compression="tiff_lzw"),
        encode(PICTURE, "TIFF", compression="tiff_deflate"),
        encode_png(UPRIGHT.astype(np.uint16) * 257, colour_type=2),
    ):
        assert np.array_equal(read(data), UPRIGHT)


def test_palette_agrees_between_png_gif_and_bmp() -> None:
    palette = PICTURE.quantize(32)
    expected = np.asarray(palette.convert("RGB"))
    for image_format in ("PNG", "GIF", "BMP", "TIFF"):
        assert np.array_equal(read(encode(palette, image_format)), expected), image_format


def test_grey_is_replicated() -> None:
    grey = PICTURE.convert("L")
    expected = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    for data in (encode(grey, "PNG"), encode(grey, "BMP"), encode(grey, "TIFF")):
        assert np.array_equal(read(data), expected)
    pixels = read(encode_jpeg(grey))
    assert far(pixels, expected) <= JPEG_LOSS
    assert (pixels == pixels[:, :, :1]).all()


def test_alpha_is_dropped_alike_by_every_decoder() -> None:
    rgba = PICTURE.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    for data in (
        encode(rgba, "PNG"),
        encode(rgba, "TIFF"),
        encode(rgba, "WEBP", lossless=True, exact=True),
        encode(PICTURE, "PNG", transparency=(0, 0, 60)),
        encode_png(np.dstack([UPRIGHT, UPRIGHT[:, :, 0]]), colour_type=6),
    ):
        assert np.array_equal(read(data), UPRIGHT)
    palette = PICTURE.quantize(32)
    assert np.array_equal(read(encode(palette, "PNG", transparency=bytes(range(32)))), read(encode(palette, "PNG")))


def test_sixteen_bits_are_scaled_and_rounded() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values * (255 / 65535)).astype(np.uint8)
    for image_format in ("PNG", "TIFF"):
        pixels = read(encode(Image.fromarray(values), image_format))
        assert np.array_equal(pixels, np.repeat(expected[:, :, None], 3, axis=2))
    colour = np.stack([values, values.T, values[::-1]], axis=2)
    assert far(read(encode_png(colour, colour_type=2)), np.rint(colour * (255 / 65535)).astype(np.uint8)) <= 1


def test_one_bit_is_black_and_white() -> None:
    one_bit = PICTURE.convert("1", dither=Image.Dither.NONE)
    expected = np.where(np.asarray(one_bit)[:, :, None], 255, 0).repeat(3, axis=2)
    for image_format in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(read(encode(one_bit, image_format)), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.5, 1.0]], [[0, 128, 255]]),
        ([[0.2, 0.4, 0.6]], [[51, 102, 153]]),  # within 0..1: not stretched
        ([[-1.0, 0.0, 3.0]], [[0, 64, 255]]),  # beyond: smallest to 0, largest to 255
        ([[100.0, 100.0, 100.0]], [[0, 0, 0]]),
        ([[0.0, np.nan, 2.0]], [[0, 0, 255]]),
        ([[0.0, np.inf, -np.inf]], [[0, 255, 0]]),
        ([[np.nan, np.nan, np.nan]], [[0, 0, 0]]),
    ],
)
def test_floats_are_scaled_by_the_rule(values: list[list[float]], expected: list[list[int]]) -> None:
    data = encode(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF")
    assert read(data)[:, :, 0].tolist() == expected


def test_wide_integers_are_stretched() -> None:
    data = encode(Image.fromarray(np.array([[-1000, 0, 1000]], dtype=np.int32)), "TIFF")
    assert read(data)[:, :, 0].tolist() == [[0, 128, 255]]  # 127.5 to the even neighbour


def test_lab_becomes_srgb() -> None:
    # CIE LAB of sRGB (D50): white 100, 0, 0; mid grey 53.6, 0, 0; red 54.3, 80.8, 69.9. Stored as L * 2.55, a, b + 128.
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (138, 209, 198)])
    assert far(read(encode(lab, "TIFF")), np.full((4, 4, 3), (255, 0, 0), dtype=np.uint8)) <= 6  # eight bits of LAB
    grey = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (137, 128, 128)])
    assert far(read(encode(grey, "TIFF")), np.full((4, 4, 3), 128, dtype=np.uint8)) <= 2


def test_cmyk_and_ycck_with_adobe_inversion() -> None:
    cmyk = PICTURE.convert("CMYK")
    data = encode_jpeg(cmyk)
    assert not inspect(data, LIMITS).is_fast
    assert far(read(data), UPRIGHT) <= JPEG_LOSS
    assert np.array_equal(read(encode(cmyk, "TIFF")), UPRIGHT)
    # YCCK: the ink picture as YCbCr with Adobe's transform 2. libjpeg turns Y Cb Cr into 255 - (R G B), K stays.
    ink = Image.fromarray(255 - UPRIGHT).convert("YCbCr").split()
    stored = [channel.point([255 - v for v in range(256)]) for channel in ink]
    ycck = encode_jpeg(Image.merge("CMYK", [*stored, Image.new("L", PICTURE.size, 0)]))
    at = ycck.index(b"Adobe") + 11
    assert ycck[at] == 0
    assert far(read(ycck[:at] + b"\x02" + ycck[at + 1 :]), UPRIGHT) <= JPEG_LOSS


def test_the_first_frame_stands_for_an_animation() -> None:
    others = [PICTURE.rotate(180), PICTURE.rotate(90)]
    for image_format, options in (("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encode(PICTURE, image_format, save_all=True, append_images=others, **options)
        assert np.array_equal(read(data), UPRIGHT), image_format
    palette = PICTURE.quantize(32)
    data = encode(palette, "GIF", save_all=True, append_images=[other.quantize(32) for other in others])
    assert np.array_equal(read(data), np.asarray(palette.convert("RGB")))

"""How each of Pillow's modes becomes uint8 RGB; torchvision's decoders do the same.

grey, 1-bit, palette   replicated, 0 or 255, looked up
alpha                  dropped, as convert("RGB") of Pillow and the RGB modes of torchvision and OpenCV do: the
                       stored colours are kept, whatever lies below a transparent pixel
16 bits                v * 255 / 65535, rounded; in colour the high byte, which is all that Pillow reads of it and
                       differs by one level at most
float, 32-bit integer  v * 255 if all lie in 0..1, else the smallest to 0 and the largest to 255; NaN to 0
CMYK, YCCK             255 - (c + k), without a colour profile; Adobe's inversion is undone by Pillow
LAB                    to sRGB through LittleCMS
colour profiles        ignored
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_SIXTEEN_TO_EIGHT: NDArray[np.uint8] = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 65535 = 255 · 257


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a loaded image, the caller's to write to."""
    image.info.pop("transparency", None)  # a colour key or palette alpha, dropped like any other
    if image.mode.startswith("I;16"):
        return _replicated(_SIXTEEN_TO_EIGHT[np.asarray(image)])
    if image.mode in ("F", "I"):
        return _replicated(_scaled(np.asarray(image, dtype=np.float32)))
    if image.mode == "LAB":
        return np.array(_lab_to_srgb(image))
    if image.mode == "RGBa":  # premultiplied
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _replicated(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _scaled(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    unit = np.clip((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-30), 0, 1)
    return np.rint(unit * 255).astype(np.uint8)


def _lab_to_srgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    assert converted is not None  # None only when converting in place
    return converted

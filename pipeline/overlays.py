"""Pictures for people: detections drawn over an image, and many images on one sheet. uint8 RGB in and out."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask

from model.structures import Rle

Rectangle = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""
Colour = tuple[int, int, int]

_FILL = 0.42  # opacity of a mask
_GOLDEN = 0.618034  # of the colour circle from one instance to the next: neighbours in rank differ most


def draw_overlay(
    image: NDArray[np.uint8],
    *,
    boxes: NDArray[np.float32],
    labels: Sequence[str],
    scores: Sequence[float] | NDArray[np.float32],
    masks: Sequence[Rle],
) -> NDArray[np.uint8]:
    """Translucent masks with an outline, thin boxes, and labels with scores where they find room.

    D detections, best first: boxes (D, 4), the others D long; ``masks`` may be empty. The best lie on top.
    """
    height, width, _ = image.shape
    line = max(1, round(min(height, width) / 320))
    colours = [instance_colour(rank) for rank in range(len(boxes))]
    pixels = image.astype(np.float32)
    for rle, colour in reversed(list(zip(masks, colours, strict=False))):
        _blend_mask(pixels, coco_mask.decode(rle).astype(bool), colour, line)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for box, colour in reversed(list(zip(boxes.tolist(), colours, strict=True))):
        x1, y1, x2, y2 = box
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
    texts = [f"{label} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    _draw_labels(draw, (width, height), boxes.tolist(), texts, colours)
    return np.array(picture)


def draw_rows(image: NDArray[np.uint8], rows: Sequence[Mapping[str, Any]]) -> NDArray[np.uint8]:
    """The same from rows of a results table's ``instances``, best first."""
    return draw_overlay(
        image,
        boxes=np.array([[row[name] for name in ("x1", "y1", "x2", "y2")] for row in rows], np.float32).reshape(-1, 4),
        labels=[row["category"] for row in rows],
        scores=[row["score"] for row in rows],
        masks=[
            {"size": [row["mask_height"], row["mask_width"]], "counts": row["mask_rle"].encode()}
            for row in rows
            if row["mask_rle"] is not None
        ],
    )


def as_jpeg(image: NDArray[np.uint8], *, side: int | None = None) -> bytes:
    """A JPEG of it, scaled down where a side is longer than so many pixels."""
    picture = Image.fromarray(image)
    if side is not None:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def instance_colour(rank: int) -> Colour:
    """Bright, and far from the colours of the neighbouring ranks."""
    red, green, blue = colorsys.hsv_to_rgb((0.57 + rank * _GOLDEN) % 1, (0.85, 0.6)[rank // 8 % 2], 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def contact_sheet(
    images: Sequence[NDArray[np.uint8]], columns: int, *, width: int = 1600, gap: int = 6
) -> NDArray[np.uint8]:
    """All images in rows of ``columns``, each row scaled to one height at which it fills the width."""
    if not images or columns < 1:
        raise ValueError(f"a contact sheet needs images and columns, got {len(images)} images, {columns} columns")
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    free = width - gap * (columns + 1)
    heights = [free / sum(image.shape[1] / image.shape[0] for image in row) for row in rows]
    if len(rows) > 1:
        heights[-1] = min(heights[-1], heights[-2])  # an unfinished row is not blown up
    sheet = Image.new("RGB", (width, round(sum(heights)) + gap * (len(rows) + 1)), "white")
    top = float(gap)
    for row, height in zip(rows, heights, strict=True):
        left = float(gap)
        for image in row:
            x1, x2 = round(left), round(left + height * image.shape[1] / image.shape[0])
            y1, y2 = round(top), round(top + height)
            scaled = Image.fromarray(image).resize((max(1, x2 - x1), max(1, y2 - y1)), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (x1, y1))
            left += height * image.shape[1] / image.shape[0] + gap
        top += height + gap
    return np.array(sheet)


def _blend_mask(pixels: NDArray[np.float32], mask: NDArray[np.bool_], colour: Colour, line: int) -> None:
    """Tint the mask and draw its inner edge, with a darker seam outside that keeps it visible on its own colour."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    reach = line + 1
    window = (
        slice(max(rows[0] - reach, 0), rows[-1] + 1 + reach),
        slice(max(columns[0] - reach, 0), columns[-1] + 1 + reach),
    )
    inside = mask[window]
    padded = Image.fromarray(np.pad(inside, reach).astype(np.uint8) * 255)
    core = np.asarray(padded.filter(ImageFilter.MinFilter(2 * line + 1)))[reach:-reach, reach:-reach] > 0
    grown = np.asarray(padded.filter(ImageFilter.MaxFilter(3)))[reach:-reach, reach:-reach] > 0
    patch = pixels[window]
    patch[inside] += _FILL * (np.array(colour, dtype=np.float32) - patch[inside])
    patch[inside & ~core] = colour
    patch[grown & ~inside] *= 0.55


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    canvas: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colours: Sequence[Colour],
) -> None:
    """Best first; a label that would cover another one, or more than there is to be seen in its box, is left out."""
    width, height = canvas
    font = ImageFont.load_default(size=float(np.clip(min(canvas) / 30, 10, 28)))
    taken: list[Rectangle] = []
    for (x1, y1, x2, y2), text, colour in zip(boxes, texts, colours, strict=True):
        _, _, text_width, text_height = draw.textbbox((0, 0), text, font=font)
        w, h = text_width + 4, text_height + 3
        if w * h > (x2 - x1) * (y2 - y1):
            continue
        for left, top in ((x1, y1 - h), (x1, y1), (x2 - w, y1), (x1, y2), (x1, y2 - h)):
            x, y = min(max(left, 0), width - w), min(max(top, 0), height - h)
            place = (x, y, x + w, y + h)
            if not any(_overlap(place, other) for other in taken):
                taken.append(place)
                draw.rectangle(place, fill=colour)
                draw.text((x + 2, y), text, fill=_ink(colour), font=font)
                break


def _overlap(one: Rectangle, two: Rectangle) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _ink(colour: Colour) -> Colour:
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else (255, 255, 255)

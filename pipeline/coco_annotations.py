"""One annotation of a COCO file, checked against its image.

Parsed JSON enters with the size of its image; an ``Annotation`` leaves, or ``Unusable`` with the kind of its defect.
Polygons and run lengths that pass are safe for pycocotools, whose native code checks nothing and brings the process
down. Most outlines are drawn only for training: at COCO's scale, drawing each to check it would take minutes.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass
from math import hypot, isnan
from operator import mul, sub
from typing import Any

from pycocotools import mask as coco_mask

from model.structures import ImageSize, Rle
from pipeline.coco_defects import NUMBERS, Unusable, is_number, shown

Box = tuple[float, float, float, float]
"""x1 y1 x2 y2."""
MAX_SIDE = 200_000
"""Pixels: of an image's side, and of a polygon's coordinates either way. pycocotools keeps five points for each pixel
of an outline, in 32 bits."""
MAX_PIXELS = 2**29 - 1
"""Of an image: a run length in six characters, the most that pycocotools reads right."""

_COUNTS = re.compile(rb"(?:[P-o]{0,5}[0-O])+")
"""COCO's compressed run lengths: 5 bits a character from "0" on, a sixth bit while more follow (maskApi.c)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """One object, or one crowd."""

    annotation_id: int
    category_id: int
    """As in the file."""
    box: Box
    """x1 y1 x2 y2, clipped to the image."""
    area: float
    """Square pixels, as in the file; the box's if the file has none above zero."""
    is_crowd: bool
    segmentation: Any
    """Polygons as list[list[float]], run lengths as {"size", "counts": str or list[int]}; None for a crowd without,
    and of all if masks were not wanted."""
    keypoints: tuple[float, ...] | None
    """x, y, visibility, flattened, as in the file; None if it has none, and of all if they were not wanted."""


def checked_annotation(value: dict[str, Any], size: ImageSize, *, masks: bool, num_keypoints: int) -> Annotation:
    """From an annotation with valid ids. Without ``masks``, and with K = 0, these are neither checked nor kept."""
    if value.get("iscrowd") not in (None, 0, 1):
        raise Unusable("bad_annotation", f"iscrowd must be 0 or 1, got {shown(value['iscrowd'])}")
    is_crowd = bool(value.get("iscrowd"))
    box = _clipped_box(value.get("bbox"), size)
    area: Any = value.get("area")
    return Annotation(
        annotation_id=value["id"],
        category_id=value["category_id"],
        box=box,
        area=float(area) if is_number(area) and area > 0 else (box[2] - box[0]) * (box[3] - box[1]),
        is_crowd=is_crowd,
        segmentation=_checked_segmentation(value.get("segmentation"), size, required=not is_crowd) if masks else None,
        keypoints=_checked_keypoints(value.get("keypoints"), num_keypoints) if num_keypoints else None,
    )


def draw(annotation: Annotation, size: ImageSize) -> Rle:
    """The mask of a checked annotation, as pycocotools' annToRLE."""
    segmentation = annotation.segmentation
    if segmentation is None:
        raise ValueError(f"annotation {annotation.annotation_id} has no mask; read the file with masks wanted")
    if isinstance(segmentation, list):
        counts = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))["counts"]
    elif isinstance(segmentation["counts"], list):
        counts = coco_mask.frPyObjects(segmentation, *size)["counts"]
    else:
        counts = segmentation["counts"]
    return Rle(size=list(size), counts=counts.encode() if isinstance(counts, str) else counts)


def as_coco(annotation: Annotation, num_keypoints: int) -> dict[str, Any]:
    """The annotation as pycocotools scores against it, but for its image's id. A crowd without mask gets its box's."""
    x1, y1, x2, y2 = annotation.box
    keypoints = annotation.keypoints or (0.0,) * (3 * num_keypoints)
    segmentation = annotation.segmentation
    if segmentation is None and annotation.is_crowd:
        segmentation = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return {
        "id": annotation.annotation_id,
        "category_id": annotation.category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": annotation.area,
        "iscrowd": int(annotation.is_crowd),
        "keypoints": list(keypoints),
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
        **({} if segmentation is None else {"segmentation": segmentation}),
    }


def checked_size(height: Any, width: Any) -> ImageSize:
    for name, value in (("height", height), ("width", width)):
        if not is_number(value) or value != int(value) or not 1 <= value <= MAX_SIDE:
            raise Unusable("bad_image", f"{name} must be 1 to {MAX_SIDE:,} pixels, got {shown(value)}")
    if height * width > MAX_PIXELS:
        raise Unusable("bad_image", f"at most {MAX_PIXELS:,} pixels can be run-length encoded, got {height} x {width}")
    return ImageSize(int(height), int(width))


def _clipped_box(value: Any, size: ImageSize) -> Box:
    """From COCO's x, y, width, height."""
    if type(value) is not list or len(value) != 4 or not all(map(is_number, value)):
        raise Unusable("bad_box", f"bbox must be x, y, width, height, got {shown(value)}")
    x, y, width, height = value
    if width <= 0 or height <= 0:
        raise Unusable("zero_area", f"bbox {shown(value)} has no area")
    if x >= size.width or y >= size.height or x + width <= 0 or y + height <= 0:
        raise Unusable("outside_image", f"bbox {shown(value)} lies outside the image, {_shown_size(size)}")
    box = float(max(x, 0)), float(max(y, 0)), float(min(x + width, size.width)), float(min(y + height, size.height))
    x1, y1, x2, y2 = array("f", box)  # as trained on
    if x1 >= x2 or y1 >= y2:
        raise Unusable("zero_area", f"bbox {shown(value)} has no area within the image, {_shown_size(size)}")
    return box


def _checked_segmentation(value: Any, size: ImageSize, *, required: bool) -> Any:
    """Polygons as in the file, or {"size", "counts"}; None if there is none and none is required."""
    if not value:
        if required:
            raise Unusable("bad_segmentation", f"segmentation is missing, got {shown(value)}")
        return None
    if type(value) is list:
        _check_polygons(value, size)
        return value
    if type(value) is dict:
        return _checked_rle(value, size)
    raise Unusable("bad_segmentation", f"segmentation must be polygons or run lengths, got {shown(value)}")


def _checked_keypoints(value: Any, num_keypoints: int) -> tuple[float, ...] | None:
    if not value:
        return None
    if type(value) is not list or len(value) != 3 * num_keypoints or not all(map(is_number, value)):
        length = f"{len(value)} values" if type(value) is list else type(value).__name__
        raise Unusable(
            "bad_keypoints",
            f"keypoints must be x, y, visibility of {num_keypoints}, so {3 * num_keypoints} finite numbers, "
            f"got {length}: {shown(value)}",
        )
    return tuple(map(float, value))


def _shown_size(size: ImageSize) -> str:
    return f"{size.width} x {size.height}"


def _check_polygons(parts: list[Any], size: ImageSize) -> None:
    covers = False
    for part in parts:
        if type(part) is not list or len(part) < 6 or len(part) % 2:
            length = f"{len(part)} values" if type(part) is list else type(part).__name__
            raise Unusable("bad_segmentation", f"a polygon needs 3 points x, y or more, got {length}: {shown(part)}")
        if not set(map(type, part)) <= NUMBERS or min(part) < -MAX_SIDE or max(part) > MAX_SIDE:
            raise Unusable("bad_segmentation", f"a polygon has a coordinate that is none: {shown(part)}")
        part_area, perimeter = _area_and_perimeter(part)
        if isnan(part_area):  # which min and max may pass over
            raise Unusable("bad_segmentation", f"a polygon has a coordinate that is NaN: {shown(part)}")
        # No circle within has a radius below area / perimeter; one of a pixel's radius holds the centres of pixels.
        covers = covers or (part_area >= perimeter > 0 and _lies_within(part, size))
    if not covers and _num_drawn(parts, size) == 0:
        raise Unusable("zero_area", f"polygons cover no pixel: {shown(parts)}")


def _area_and_perimeter(part: list[float]) -> tuple[float, float]:
    """Lists, not arrays: most outlines are too short to repay NumPy's calls."""
    x, y = part[0::2], part[1::2]
    next_x, next_y = x[1:] + x[:1], y[1:] + y[:1]
    twice = sum(map(mul, x, next_y)) - sum(map(mul, next_x, y))
    return abs(twice) / 2, sum(map(hypot, map(sub, next_x, x), map(sub, next_y, y)))


def _lies_within(part: list[float], size: ImageSize) -> bool:
    x, y = part[0::2], part[1::2]
    return min(x) >= 0 and min(y) >= 0 and max(x) <= size.width and max(y) <= size.height


def _num_drawn(parts: list[Any], size: ImageSize) -> int:
    """Pixels set when checked polygons are drawn."""
    return int(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(parts, size.height, size.width))))


def _checked_rle(value: dict[Any, Any], size: ImageSize) -> dict[str, Any]:
    counts = value.get("counts")
    if value.get("size") != [size.height, size.width]:
        raise Unusable(
            "bad_segmentation",
            f"run lengths must be of the image's size [height, width] {list(size)}, got {shown(value.get('size'))}",
        )
    runs = _runs(counts)
    num_pixels = size.height * size.width
    if runs is None or min(runs, default=0) < 0:
        raise Unusable("bad_segmentation", f"counts are no run lengths: {shown(counts)}")
    if sum(runs) != num_pixels:
        raise Unusable("bad_segmentation", f"run lengths must add up to {num_pixels} pixels, got {sum(runs)}")
    if not any(runs[1::2]):
        raise Unusable("zero_area", f"run lengths {shown(counts)} set no pixel")
    return {"size": list(size), "counts": counts}


def _runs(counts: Any) -> list[int] | None:
    """Run lengths as in the file, or of a compressed string; None if it is neither."""
    if type(counts) is list:
        return counts if set(map(type, counts)) <= {int} else None
    if type(counts) is not str or not counts.isascii():
        return None
    text = counts.encode()
    if _COUNTS.fullmatch(text) is None:
        return None
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = character - 48
        value |= (code & 31) << shift
        shift += 5
        if code < 32:
            value -= (code & 16) << (shift - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs

"""A file for each image of a results table: polygons for YOLO and LabelMe, label maps, overlays.

Polygons are traced by OpenCV, through the centres of border pixels as its tools expect; holes are lost.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline import storage
from pipeline.errors import ConfigError, DecodeError
from pipeline.export import ImageRows, Row, without_extension
from pipeline.originals import read_originals
from pipeline.overlays import as_jpeg, draw_rows
from pipeline.uris import local_path

IMAGES_AT_ONCE = 16
"""Originals that are read together."""
MAX_LABELS = 65_535
"""In a label map of 16 bits."""


def write_yolo(rows: Iterator[ImageRows], folder: str, categories: Mapping[int, str]) -> Counter[str]:
    """YOLO's segmentation labels: ``labels/….txt``, a class and a polygon in shares of the image on each line, and
    ``data.yaml`` with the classes. An instance in several parts has a line for each."""
    counts: Counter[str] = Counter()
    order = {category_id: index for index, category_id in enumerate(sorted(categories))}
    for image, instances in rows:
        scale = np.array([image["width"], image["height"]], float)
        lines = [
            f"{order[instance['category_id']]} " + " ".join(f"{value:.6g}" for value in (part / scale).ravel())
            for instance in instances
            for part in polygons_of(instance)
        ]
        storage.write_bytes(
            storage.join(folder, "labels", f"{without_extension(image['file_name'])}.txt"),
            "".join(f"{line}\n" for line in lines).encode(),
        )
        counts.update(images=1, instances=len(instances))
    classes = "".join(f"  {order[index]}: {json.dumps(categories[index])}\n" for index in sorted(categories))
    storage.write_bytes(
        storage.join(folder, "data.yaml"), f"path: .\ntrain: images\nval: images\nnames:\n{classes}".encode()
    )
    return counts


def write_labelme(rows: Iterator[ImageRows], folder: str) -> Counter[str]:
    """LabelMe's JSON, a polygon for each part of an instance, which share its group. It leads to images that are files
    here; others are looked for beside it."""
    counts: Counter[str] = Counter()
    for image, instances in rows:
        place = storage.join(folder, f"{without_extension(image['file_name'])}.json")
        shapes = [
            {
                "label": instance["category"],
                "points": part.tolist(),
                "group_id": instance["instance_index"],
                "description": f"score {instance['score']:.4f}",
                "shape_type": "polygon",
                "flags": {},
            }
            for instance in instances
            for part in polygons_of(instance)
        ]
        document = {
            "version": "5.0.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": _path_from(place, image),
            "imageData": None,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        storage.write_bytes(place, json.dumps(document).encode())
        counts.update(images=1, instances=len(instances))
    return counts


def _path_from(place: str, image: Row) -> str:
    label_file = local_path(place)
    if label_file is None or not os.path.isfile(image["image_key"]):
        return str(image["file_name"]).rpartition("/")[2]
    return os.path.relpath(image["image_key"], os.path.dirname(os.path.abspath(label_file)))


def write_masks(rows: Iterator[ImageRows], folder: str) -> Counter[str]:
    """A 16-bit PNG for each image: 0 where there is nothing, else one more than the ``instance_index`` of the best
    instance there."""
    counts: Counter[str] = Counter()
    for image, instances in rows:
        labels = np.zeros((image["height"], image["width"]), np.uint16)
        for instance in reversed(instances):
            if instance["instance_index"] >= MAX_LABELS:
                raise ConfigError(
                    f"{image['image_key']} has an instance {instance['instance_index']}, and a label map of 16 bits "
                    f"has room for {MAX_LABELS}: leave the weakest out with --where"
                )
            mask = mask_of(instance)
            if mask is not None:
                labels[mask] = instance["instance_index"] + 1
        _write_png(labels, storage.join(folder, f"{image['file_name']}.png"))
        counts.update(images=1, instances=len(instances))
    return counts


def write_overlays(rows: Iterator[ImageRows], folder: str) -> Counter[str]:
    """A JPEG for each image with its instances drawn over it. Images that are gone since are counted."""
    counts: Counter[str] = Counter()
    while chunk := list(islice(rows, IMAGES_AT_ONCE)):
        originals = read_originals([image["image_key"] for image, _ in chunk])
        for image, instances in chunk:
            original = originals[image["image_key"]]
            if isinstance(original, DecodeError):
                counts["images that are gone"] += 1
                continue
            drawn = as_jpeg(draw_rows(original, instances))
            storage.write_bytes(storage.join(folder, f"{image['file_name']}.jpg"), drawn)
            counts.update(images=1, instances=len(instances))
    return counts


def mask_of(instance: Row) -> NDArray[np.bool_] | None:
    """(H, W), None of a network without masks."""
    if instance["mask_rle"] is None:
        return None
    size = [instance["mask_height"], instance["mask_width"]]
    mask: NDArray[np.bool_] = coco_mask.decode({"size": size, "counts": instance["mask_rle"].encode()}).astype(bool)
    return mask


def polygons_of(instance: Row) -> list[NDArray[np.float64]]:
    """The outer borders of an instance's parts, (P, 2) x y in pixels each, at least a triangle; of its box, where it
    has no mask.

    Raises:
        ConfigError: OpenCV is not installed.
    """
    mask = mask_of(instance)
    if mask is None:
        x1, y1, x2, y2 = (instance[name] for name in ("x1", "y1", "x2", "y2"))
        return [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], float)]
    try:
        import cv2
    except ImportError as error:
        raise ConfigError("polygons need OpenCV: pip install 'maskline[export]'") from error
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    parts = [contour[:, 0, :].astype(float) for contour in contours]
    return [part if len(part) >= 3 else _thickened(part) for part in parts]


def _thickened(part: NDArray[np.float64]) -> NDArray[np.float64]:
    """The pixels of a point or a line as a rectangle around their centres."""
    (left, top), (right, bottom) = part.min(axis=0) - 0.5, part.max(axis=0) + 0.5
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]]).clip(0)


def _write_png(pixels: NDArray[Any], uri: str) -> None:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    storage.write_bytes(uri, file.getvalue())

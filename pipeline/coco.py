"""COCO annotation files: images with their objects, and a name and a count for all that cannot be used.

A URI enters, ``.json`` or gzipped; images with checked annotations leave, with the defects of the rest. What is wrong
with the file as a whole is a ``ConfigError``. Format: cocodataset.org/#format-data. Ids must be integers: a string id,
even of digits, is a defect, as nothing says whether "7" and "007" are one.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import posixpath
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from model.structures import ImageSize
from pipeline import storage
from pipeline.coco_annotations import Annotation, as_coco, checked_annotation, checked_size
from pipeline.coco_defects import Defects, Unusable, is_id, shown
from pipeline.errors import ConfigError

# K keypoints.

Wanted = frozenset[Literal["masks", "keypoints"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoImage:
    """One image of the file."""

    image_id: int
    file_name: str
    """Without "./" and doubled slashes."""
    size: ImageSize
    annotations: tuple[Annotation, ...]
    """The usable ones, crowds among them."""


@dataclass(frozen=True, kw_only=True)
class CocoDataset:
    """What of a COCO file can be used."""

    images: list[CocoImage]
    """In the file's order, those without objects too."""
    categories: dict[int, str]
    """Names by id, ascending."""
    keypoint_names: tuple[str, ...]
    """Of the K keypoints of the first category that has any."""
    defects: Defects

    @property
    def num_keypoints(self) -> int:
        """K; 0 if no category has keypoints."""
        return len(self.keypoint_names)

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        """The keypoints that a mirror exchanges, by their names: left_eye and right_eye."""
        index = {name: number for number, name in enumerate(self.keypoint_names)}
        others = (
            (number, index.get(name.replace("left", "right"))) for name, number in index.items() if "left" in name
        )
        return tuple((left, right) for left, right in others if right is not None)

    def coco(self) -> Any:
        """``pycocotools.coco.COCO`` of exactly these images and annotations, to score against; id 0 becomes another."""
        from pycocotools.coco import COCO

        index = COCO()
        index.dataset = {
            "info": {},
            "images": [
                {"id": image.image_id, "file_name": image.file_name, **image.size._asdict()} for image in self.images
            ],
            "categories": [{"id": category_id, "name": name} for category_id, name in self.categories.items()],
            "annotations": [
                {"image_id": image.image_id, **as_coco(annotation, self.num_keypoints)}
                for image in self.images
                for annotation in image.annotations
            ],
        }
        _give_ids_above_zero(index.dataset["annotations"])
        with contextlib.redirect_stdout(io.StringIO()):
            index.createIndex()
        return index


def read_coco(uri: str, *, wanted: Wanted = frozenset({"masks"}), require_annotations: bool = True) -> CocoDataset:
    """Read and check a file. Masks and keypoints that are not ``wanted`` are neither checked nor kept."""
    shown_uri = storage.public_uri(uri)
    document = _document(uri, shown_uri)
    defects = Defects()
    categories, keypoint_names = _categories(document["categories"], wanted, defects, shown_uri)
    images = _images(document["images"], defects)
    found: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    ids: set[int] = set()
    for index, value in enumerate(document["annotations"]):
        try:
            image = _image_of(value, ids, images, categories)
            annotation = checked_annotation(
                value,
                image.size,
                masks="masks" in wanted,
                num_keypoints=len(keypoint_names) if "keypoints" in wanted else 0,
            )
        except Unusable as defect:
            defects.add(defect.kind, f"{_entry('annotation', index, value)}: {defect}")
        else:
            found[image.image_id].append(annotation)
    usable = [replace(image, annotations=tuple(found[image.image_id])) for image in images.values()]
    dataset = CocoDataset(
        images=usable, categories=dict(sorted(categories.items())), keypoint_names=keypoint_names, defects=defects
    )
    listed = f"{len(document['images']):,} images and {len(document['annotations']):,} annotations"
    if require_annotations or not usable:
        _require_usable(dataset, f"{shown_uri}, which lists {listed}", "correct the file, or give another")
    return dataset


def find_missing_files(dataset: CocoDataset, folder: str) -> CocoDataset:
    """The dataset without the images that are not in ``folder``, which is listed once, whatever its size."""
    shown_folder = storage.public_uri(folder)
    root = shown_folder.rstrip("/") + "/"
    names = {image.file_name for image in dataset.images}
    try:
        listing = storage.list_files(folder)
        present = {
            name
            for file in listing
            if file.version != storage.MISSING_VERSION and (name := file.uri.removeprefix(root)) in names
        }
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot list the images in {shown_folder}: {error}") from error
    defects = dataset.defects.copy()
    for image in dataset.images:
        if image.file_name not in present:
            lost = f"image {image.image_id} with {len(image.annotations)} annotations"
            defects.add("missing_file", f"{lost}: {image.file_name!r} is not in {shown_folder}")
    images = [image for image in dataset.images if image.file_name in present]
    checked = replace(dataset, images=images, defects=defects)
    _require_usable(checked, shown_folder, "give the folder that file_name is relative to")
    return checked


# ------------------------------------------------------------------------------------------------------------ reading


def _document(uri: str, shown_uri: str) -> dict[str, Any]:
    try:
        data = storage.read_bytes(uri)
    except (OSError, ValueError) as error:  # a ValueError for a NUL in a path
        raise ConfigError(f"cannot read the annotations {shown_uri}: {error}") from error
    try:
        document = json.loads(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)
    except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"{shown_uri} is not JSON: {error}; give a COCO file, .json or .json.gz") from error
    needed = ("images", "annotations", "categories")
    if not isinstance(document, dict):
        raise ConfigError(f"{shown_uri} holds a {type(document).__name__}; give a COCO object with {', '.join(needed)}")
    for name in needed:
        if not isinstance(document.get(name), list):
            kind = type(document[name]).__name__ if name in document else "nothing"
            raise ConfigError(f"{shown_uri} must have a list of {name}, got {kind}; give COCO's instances format")
    return document


def _categories(
    values: list[Any], wanted: Wanted, defects: Defects, shown_uri: str
) -> tuple[dict[int, str], tuple[str, ...]]:
    """Names of the categories and of their keypoints."""
    names: dict[int, str] = {}
    lists_of_keypoints: dict[int, tuple[str, ...]] = {}  # by their number
    for index, value in enumerate(values):
        fields = value if isinstance(value, dict) else {}
        category_id: Any = fields.get("id")
        name, keypoints = fields.get("name"), fields.get("keypoints") or []
        if not is_id(category_id) or not isinstance(name, str) or not isinstance(keypoints, list):
            reason = f"a category needs an integer id, a name and, if any, a list of keypoints, got {shown(value)}"
        elif category_id in names:
            reason = f"the id is that of {shown(names[category_id])} too"
        else:
            names[category_id] = name
            if keypoints:
                lists_of_keypoints.setdefault(len(keypoints), tuple(map(str, keypoints)))
            continue
        defects.add("bad_category", f"{_entry('category', index, value)}: {reason}")
    if "keypoints" in wanted and len(lists_of_keypoints) != 1:
        found = " and ".join(map(str, sorted(lists_of_keypoints))) or "no"
        raise ConfigError(
            f"the categories of {shown_uri} have {found} keypoints; all that have any need the same number"
        )
    return names, lists_of_keypoints[max(lists_of_keypoints)] if lists_of_keypoints else ()


def _images(values: list[Any], defects: Defects) -> dict[int, CocoImage]:
    """By id, without annotations."""
    images: dict[int, CocoImage] = {}
    ids_by_file: dict[str, int] = {}
    for index, value in enumerate(values):
        try:
            image = _image(value)
            if image.image_id in images:
                raise Unusable("duplicate_image_id", f"the id is that of {images[image.image_id].file_name!r} too")
            if image.file_name in ids_by_file:
                first = ids_by_file[image.file_name]
                raise Unusable("duplicate_file_name", f"{image.file_name!r} is the file of image {first} too")
        except Unusable as defect:
            defects.add(defect.kind, f"{_entry('image', index, value)}: {defect}")
        else:
            images[image.image_id] = image
            ids_by_file[image.file_name] = image.image_id
    return images


def _image(value: Any) -> CocoImage:
    if not isinstance(value, dict) or not is_id(value.get("id")):
        raise Unusable("bad_image", f"an image needs an integer id, got {shown(value)}")
    file_name = value.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise Unusable("bad_image", f"file_name is missing, got {shown(file_name)}")
    size = checked_size(value.get("height"), value.get("width"))
    return CocoImage(image_id=value["id"], file_name=posixpath.normpath(file_name), size=size, annotations=())


def _image_of(value: Any, ids: set[int], images: Mapping[int, CocoImage], categories: Mapping[int, str]) -> CocoImage:
    """The image of an annotation, whose own id joins ``ids``."""
    if not isinstance(value, dict) or not is_id(value.get("id")):
        raise Unusable("bad_annotation", f"an annotation needs an integer id, got {shown(value)}")
    annotation_id: int = value["id"]
    image_id: Any = value.get("image_id")
    category_id: Any = value.get("category_id")
    if annotation_id in ids:
        raise Unusable("duplicate_annotation_id", "an earlier annotation has this id")
    ids.add(annotation_id)
    if not is_id(image_id) or image_id not in images:
        raise Unusable("unknown_image", f"image_id {shown(image_id)} is that of no usable image")
    if not is_id(category_id) or category_id not in categories:
        raise Unusable("unknown_category", f"category_id {shown(category_id)} is that of no usable category")
    return images[image_id]


def _entry(name: str, index: int, value: Any) -> str:
    """How a message names an entry of the file: by its id, without one by its place."""
    if not isinstance(value, dict) or not is_id(value.get("id")):
        return f"{name} at place {index}"
    if is_id(value.get("image_id")):
        return f"{name} {value['id']} of image {value['image_id']}"
    return f"{name} {value['id']}"


def _require_usable(dataset: CocoDataset, where: str, next_step: str) -> None:
    num_annotations = sum(len(image.annotations) for image in dataset.images)
    if num_annotations == 0:
        lacking = "annotation" if dataset.images else "image"
        defects = dataset.defects
        found = "".join(f"\n{count:,} {kind}: {defects.examples[kind][0]}" for kind, count in defects.counts.items())
        raise ConfigError(f"no usable {lacking} in {where}; {next_step}{found}")


def _give_ids_above_zero(annotations: list[dict[str, Any]]) -> None:
    """COCOeval notes a match by the annotation's id and reads 0 as none, so an object of id 0 is never found."""
    for annotation in annotations:
        if annotation["id"] == 0:
            annotation["id"] = max(1, *(other["id"] + 1 for other in annotations))

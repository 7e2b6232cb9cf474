"""A results table in the hands of other libraries, which maskline does not install.

Rows of the table enter; ``supervision.Detections`` of one image, or a ``fiftyone.Dataset`` of all, leave.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.export import ImageRows, Row, images_with_instances
from pipeline.export_files import mask_of
from pipeline.results import Results

if TYPE_CHECKING:
    import fiftyone
    import supervision

BOX = ("x1", "y1", "x2", "y2")
logger = logging.getLogger(__name__)


def to_supervision(instances: pa.Table) -> supervision.Detections:
    """The D instances of one image, in the order of their rows, which have all columns of ``instances``.

    ``xyxy`` (D, 4) float32 are the table's boxes in pixels, ``confidence`` (D,) float32 its scores, ``class_id`` (D,)
    int64 the weights' own ids, ``data["class_name"]`` (D,) the categories. ``mask`` is (D, H, W) bool, None where an
    instance has none. No rows give ``Detections.empty()``.

    Raises:
        ValueError: the rows are of several images.
        ConfigError: supervision is not installed.
    """
    sv = _imported("supervision")
    keys = instances["image_key"].unique().to_pylist()
    if len(keys) > 1:
        raise ValueError(f"Detections are of one image, these rows of {len(keys)}: {', '.join(keys[:9])}")
    if not (rows := instances.to_pylist()):
        return sv.Detections.empty()
    masks = [mask for row in rows if (mask := mask_of(row)) is not None]
    return sv.Detections(
        xyxy=np.array([[row[side] for side in BOX] for row in rows], np.float32),  # (D, 4)
        mask=np.stack(masks) if len(masks) == len(rows) else None,  # (D, H, W)
        confidence=np.array([row["score"] for row in rows], np.float32),
        class_id=np.array([row["category_id"] for row in rows], np.int64),
        data={"class_name": np.array([row["category"] for row in rows])},
    )


def to_fiftyone(results: Results, *, name: str | None = None, where: str | None = None) -> fiftyone.Dataset:
    """A sample for each image that is ok and a local file, its instances in the field ``maskline``.

    A detection's ``label`` is the category, its ``confidence`` the score; ``instance_index`` and ``box``, the table's
    own x1 y1 x2 y2 in pixels, lead back to the row. FiftyOne stretches ``mask`` (h, w) bool over ``bounding_box``, x y
    width height in shares of the image: this is the smallest box of whole pixels that holds both the table's box and
    the mask, so that no pixel moves. Without a mask it is the table's box.

    Images in archives and object stores, which FiftyOne cannot open, and those that are gone are left out; a warning
    and ``dataset.info["maskline"]`` say how many. The others go over in batches, so memory does not grow with masks.
    ``where`` is SQL over columns of instances, as in ``maskline export``. Set ``persistent`` to keep the dataset.

    Raises:
        ConfigError: fiftyone is not installed, no image is a local file, or the condition was not accepted.
        ValueError: fiftyone has a dataset of that name. Whatever is raised, no new dataset is left behind.
    """
    fo = _imported("fiftyone")
    with ExitStack() as undo:
        dataset = fo.Dataset(name)
        undo.callback(dataset.delete)
        dataset.add_samples(_samples(fo, images_with_instances(results, where=where)), dynamic=True)
        left_out = results.images().count_rows(filter=pc.field("status") == "ok") - len(dataset)
        if left_out and not len(dataset):
            raise ConfigError(f"no image of {results.output} is a local file, and fiftyone opens nothing else")
        dataset.info["maskline"] = {"output": results.output, "images_left_out": left_out}
        dataset.save()
        undo.pop_all()
    if left_out:
        logger.warning("%d images left out, which are no local files; %d taken", left_out, len(dataset))
    return dataset


def _samples(fo: Any, rows: Iterator[ImageRows]) -> Iterator[Any]:
    for image, instances in rows:
        if Path(image["image_key"]).is_file():
            metadata = fo.ImageMetadata(size_bytes=image["bytes"], width=image["width"], height=image["height"])
            found = fo.Detections(detections=[fo.Detection(**_detection(instance)) for instance in instances])
            yield fo.Sample(filepath=image["image_key"], media_type="image", metadata=metadata, maskline=found)


def _detection(instance: Row) -> Row:
    x1, y1, x2, y2 = box = [instance[side] for side in BOX]
    height, width = instance["mask_height"], instance["mask_width"]
    x, y, w, h = x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height
    if (mask := mask_of(instance)) is not None:
        columns, x, w = _whole(np.any(mask, axis=0), x1, x2)
        rows, y, h = _whole(np.any(mask, axis=1), y1, y2)
        mask = mask[rows, columns].copy()  # (h, w); a view would keep all of (H, W)
    named = {"label": instance["category"], "confidence": instance["score"], "bounding_box": [x, y, w, h], "mask": mask}
    return named | {"instance_index": instance["instance_index"], "box": box}


def _whole(covered: Any, start: float, stop: float) -> tuple[slice, float, float]:
    """The pixels of one axis, at least one, that the mask covers or the box touches; their begin and length in shares,
    a step up, for FiftyOne takes int(size * begin) and int(size * (begin + length)), which may not fall one short."""
    size = len(covered)
    first = min(max(math.floor(start), 0), size - 1)
    covered[first : max(math.ceil(stop), first + 1)] = True
    pixels = np.flatnonzero(covered).tolist()
    first, end = pixels[0], pixels[-1] + 1
    begin = math.nextafter(first / size, first)  # 0 stays 0
    length = math.nextafter(math.nextafter(end / size, 1) - begin, 1)
    return slice(first, end), begin, min(length, 1 - begin)


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ConfigError(f"{library} cannot be imported ({error}): pip install {library}") from error

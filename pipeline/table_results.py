"""The rows of a results table as COCO results of the annotated images they belong to.

A table and the file names of a COCO dataset enter; results and what could not be matched leave.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.coco_evaluation import Result, as_xywh, category_mapping
from pipeline.errors import ConfigError
from pipeline.items import printable
from pipeline.results import Results


@dataclass(frozen=True, kw_only=True)
class TableResults:
    """The rows of a results table that belong to annotated images."""

    results: list[Result]
    image_ids: dict[str, int]
    """image_key → COCO image id, of every row that belongs to an annotated image."""
    sizes: dict[int, tuple[int, int] | None]
    """COCO image id → height and width in pixels; None where the row says failed."""
    failed_by_reason: dict[str, int]
    num_unknown_images: int
    """Rows of images that the annotations lack."""
    num_unknown_instances: int
    """Instances of annotated images in categories that the annotations lack."""
    settings: list[dict[str, Any]]
    """What the rows were made with; several where runs differed."""
    categories: set[str]
    """That the networks which made the rows know."""


def match_image_keys(
    keys: Iterable[str], image_ids: Mapping[str, int], image_prefix: str | None = None
) -> dict[str, int]:
    """image_key → image id, where the file name is the whole key or what follows one of its `/` or `#`.

    Args:
        image_ids: file name → image id. Of several names that fit, the longest counts.
        image_prefix: a key is then this URI and a file name, and nothing else.

    Raises:
        ConfigError: two keys belong to one image.
    """
    wanted = {printable(name): image_id for name, image_id in image_ids.items()}
    if image_prefix is not None:
        wanted = {key: index for name, index in image_ids.items() for key in _prefixed(image_prefix, name)}
    matched: dict[str, int] = {}
    taken: dict[int, str] = {}
    for key in keys:
        places = [0] if image_prefix is not None else [0, *(match.end() for match in re.finditer("[/#]", key))]
        name = next((key[place:] for place in places if key[place:] in wanted), None)
        if name is None:
            continue
        image_id = wanted[name]
        other = taken.setdefault(image_id, key)
        if other != key:
            raise ConfigError(
                f"{other} and {key} both fit the annotations' image {name}; say with --image-prefix what "
                "stands before the file names in the keys that are meant"
            )
        matched[key] = image_id
    return matched


def _prefixed(prefix: str, file_name: str) -> set[str]:
    """The keys that a prefix and a file name make: written one after the other, or as a folder and a file in it."""
    return {printable(storage.public_uri(uri)) for uri in (prefix + file_name, storage.join(prefix, file_name))}


def read_table(
    table: Results, image_ids: Mapping[str, int], categories: Mapping[int, str], image_prefix: str | None = None
) -> TableResults:
    """What a table says of annotated images, as COCO results.

    Args:
        image_ids: file name → image id.
        categories: COCO category id → name.

    Raises:
        ConfigError: two rows belong to one image, or the table's weights and the annotations share no category.
    """
    rows = table.images().to_table(columns=["image_key", "status", "reason", "height", "width", "shard_id"])
    keys = rows["image_key"].to_pylist()
    matched = match_image_keys(keys, image_ids, image_prefix)
    rows = rows.filter(pa.array([key in matched for key in keys], pa.bool_()))
    metadata = _metadata(table, set(rows["shard_id"].unique().to_pylist()))
    known = {name for made in metadata for name in json.loads(made[b"maskline.categories"]).values()}
    if known:
        category_mapping(dict(enumerate(sorted(known))), categories)
    results, num_unknown = _instances(table, matched, {name: index for index, name in sorted(categories.items())[::-1]})
    failed = rows.filter(pc.equal(rows["status"], "failed"))
    heights, widths = rows["height"].to_pylist(), rows["width"].to_pylist()
    return TableResults(
        results=results,
        image_ids=matched,
        sizes={
            matched[key]: None if height is None else (height, width)
            for key, height, width in zip(rows["image_key"].to_pylist(), heights, widths, strict=True)
        },
        failed_by_reason=dict(Counter(failed["reason"].to_pylist())),
        num_unknown_images=len(keys) - len(matched),
        num_unknown_instances=num_unknown,
        settings=[json.loads(made[b"maskline.settings"]) for made in metadata],
        categories=known,
    )


def _metadata(table: Results, shard_ids: set[str]) -> list[dict[bytes, bytes]]:
    """The key-value metadata of the rows of these shards, one for each weights and settings."""
    files = {
        (commit.weights_sha256, commit.settings_hash): file.path
        for commit in table.commits
        if commit.shard_id in shard_ids
        for file in commit.files
        if file.table == "images"
    }
    filesystem, root = storage.resolve(table.output)
    return [pq.read_schema(f"{root.rstrip('/')}/{path}", filesystem=filesystem).metadata for path in files.values()]


def _instances(
    table: Results, image_ids: Mapping[str, int], category_ids: Mapping[str, int]
) -> tuple[list[Result], int]:
    """Instances of these images and categories, and how many of these images had other categories."""
    keys, names = pa.array([*image_ids], pa.string()), pa.array([*category_ids], pa.string())
    ids_of_images, ids_of_categories = np.array([*image_ids.values()], int), np.array([*category_ids.values()], int)
    results: list[Result] = []
    num_unknown = 0
    columns = ["image_key", "category", "score", "x1", "y1", "x2", "y2"]
    columns += ["mask_height", "mask_width", "mask_rle", "keypoints"]
    for batch in table.instances().to_batches(columns=columns):
        rows = batch.filter(pc.is_in(batch["image_key"], keys))
        known = pc.is_in(rows["category"], names)
        num_unknown += rows.num_rows - known.true_count
        rows = rows.filter(known)
        images = ids_of_images[pc.index_in(rows["image_key"], keys).to_numpy(zero_copy_only=False)]
        categories = ids_of_categories[pc.index_in(rows["category"], names).to_numpy(zero_copy_only=False)]
        results += _as_results(rows, images.tolist(), categories.tolist())
    return results, num_unknown


def _as_results(rows: pa.RecordBatch, image_ids: list[int], category_ids: list[int]) -> Iterator[Result]:
    boxes = as_xywh(np.stack([rows[name].to_numpy() for name in ("x1", "y1", "x2", "y2")], axis=1)).tolist()
    columns = (rows[name].to_pylist() for name in ("score", "mask_height", "mask_width", "mask_rle", "keypoints"))
    for image_id, category_id, box, value, height, width, counts, keypoints in zip(
        image_ids, category_ids, boxes, *columns, strict=True
    ):
        result: Result = {"image_id": image_id, "category_id": category_id, "score": value, "bbox": box}
        if counts is not None:
            result["segmentation"] = {"size": [height, width], "counts": counts}
        if keypoints is not None:
            result["keypoints"] = keypoints
        yield result

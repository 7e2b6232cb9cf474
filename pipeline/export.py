"""A results table in the forms that others read.

``images_with_instances`` gives committed images in the order of their keys, each with its instances; a writer for each
form turns them into files, one image after the other. Boxes and run lengths leave as they are in the table, to the last
bit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TextIO

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.coco import CocoDataset
from pipeline.coco_evaluation import as_xywh
from pipeline.errors import ConfigError
from pipeline.results import Results
from pipeline.schema import SCHEMAS
from pipeline.table_results import match_image_keys
from pipeline.uris import local_path

MEMORY_LIMIT = "1GB"
"""Of DuckDB while it sorts; what needs more goes to a folder of its own."""
ROWS_AT_ONCE = 2_048
"""As Python objects: a thousand of them with long run lengths take a hundred megabytes."""

Row = dict[str, Any]


class ImageRows(NamedTuple):
    """One image of the table."""

    image: Row
    instances: list[Row]
    """Best first."""


def images_with_instances(results: Results, *, where: str | None = None) -> Iterator[ImageRows]:
    """Images that are ok, by key, with those of their instances that meet a condition in SQL.

    Raises:
        ConfigError: DuckDB does not accept the condition.
    """
    condition = f"WHERE ({where})" if where else ""
    instances = _rows(
        results.instances(), f"SELECT * FROM instances {condition} ORDER BY image_key, instance_index", "instances"
    )
    following = next(instances, None)
    for image in _rows(results.images(), "SELECT * FROM images WHERE status = 'ok' ORDER BY image_key", "images"):
        found = []
        while following is not None and following["image_key"] == image["image_key"]:
            found.append(following)
            following = next(instances, None)
        yield ImageRows(image, found)
    assert following is None, f"instances of {following['image_key']} without its image"


def _rows(dataset: Any, query: str, name: str) -> Iterator[Row]:
    """What a query gives over one table, in a database of its own."""
    with (
        TemporaryDirectory(prefix="maskline-export-") as folder,
        duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": folder}) as connection,
    ):
        connection.register(name, dataset)
        try:
            reader = connection.sql(query).to_arrow_reader(ROWS_AT_ONCE)
        except duckdb.Error as error:
            raise _refused(error) from error
        for batch in reader:
            yield from batch.to_pylist()


def _refused(error: duckdb.Error) -> ConfigError:
    return ConfigError(
        f"the condition was not accepted: {error}. It is SQL over the columns of instances, as in "
        "--where \"score > 0.8 AND category = 'car'\""
    )


def named(rows: Iterator[ImageRows], results: Results) -> Iterator[ImageRows]:
    """Each image with its ``image_id``, from 1 by key, and its ``file_name``: what stands behind the folder that all
    share. No two names are alike, none leads out of its folder."""
    keys = results.images().to_table(columns=["image_key"])["image_key"]
    shared = _shared_folder(keys)
    taken: set[str] = set()
    for image_id, group in enumerate(rows, start=1):
        parts = group.image["image_key"][len(shared) :].replace("#", "/").replace("\\", "/").split("/")
        name = "/".join(part for part in parts if part not in ("", ".", "..")) or "image"
        stem = free = without_extension(name)
        number = 1
        while free in taken:  # a.jpg beside a.png: their labels would be one file
            number += 1
            free = f"{stem}-{number}"
        taken.add(free)
        yield ImageRows(group.image | {"image_id": image_id, "file_name": free + name[len(stem) :]}, group.instances)


def annotated(
    rows: Iterator[ImageRows], results: Results, dataset: CocoDataset, image_prefix: str | None = None
) -> Iterator[ImageRows]:
    """The images that the annotations have, with their ids and file names, and the instances of their categories.

    Raises:
        ConfigError: no image has one of their file names, or two have the same.
    """
    keys = results.images().to_table(columns=["image_key"])["image_key"].to_pylist()
    file_names = {image.image_id: image.file_name for image in dataset.images}
    image_ids = match_image_keys(keys, {name: index for index, name in file_names.items()}, image_prefix)
    if not image_ids:
        raise ConfigError(f"no image of {results.output} has a file name of the annotations; see --image-prefix")
    category_ids = {name: index for index, name in sorted(dataset.categories.items(), reverse=True)}
    for image, instances in rows:
        image_id = image_ids.get(image["image_key"])
        if image_id is not None:
            yield ImageRows(
                image | {"image_id": image_id, "file_name": file_names[image_id]},
                [
                    instance | {"category_id": category_ids[instance["category"]]}
                    for instance in instances
                    if instance["category"] in category_ids
                ],
            )


def without_extension(name: str) -> str:
    """``a/b`` of ``a/b.jpg``."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and stem and "/" not in extension and not stem.endswith("/") else name


def _shared_folder(keys: pa.ChunkedArray) -> str:
    """The longest beginning of all keys that ends in a slash, less the slash."""
    first, last = pc.min(keys).as_py() or "", pc.max(keys).as_py() or ""
    folders = (key[: key.find("#") if "#" in key else len(key)].rpartition("/")[0] for key in (first, last))
    shared = 0
    for one, other in zip(*(f"{folder}/" for folder in folders), strict=False):
        if one != other:
            break
        shared += 1
    return first[:shared].rpartition("/")[0]


@contextmanager
def opened(uri: str) -> Iterator[TextIO]:
    """A text file that stands at the URI once it is whole, and not before."""
    with _aside(uri) as path, path.open("w", encoding="utf-8") as file:
        yield file


@contextmanager
def _aside(uri: str) -> Iterator[Path]:
    target = local_path(uri)
    folder = Path(target).absolute().parent if target is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=storage.ASIDE_PREFIX, dir=folder) as temporary:
        path = Path(temporary) / "export"
        yield path
        if target is not None:
            path.replace(target)
        else:
            filesystem, place = storage.resolve(uri)
            filesystem.put_file(str(path), place)


# --------------------------------------------------------------------------------------------------------------- COCO


def write_coco_results(rows: Iterator[ImageRows], uri: str) -> Counter[str]:
    """COCO's results: a list of detections."""
    counts: Counter[str] = Counter()
    with opened(uri) as file:
        file.write("[")
        for image, instances in rows:
            for instance in instances:
                file.write(
                    ("\n" if not counts["instances"] else ",\n") + json.dumps(as_result(instance, image["image_id"]))
                )
                counts["instances"] += 1
            counts["images"] += 1
        file.write("\n]\n")
    return counts


def write_coco(rows: Iterator[ImageRows], uri: str, categories: Mapping[int, str]) -> Counter[str]:
    """A COCO dataset, its annotations with their scores."""
    counts: Counter[str] = Counter()
    with opened(uri) as file, TemporaryDirectory(prefix="maskline-export-") as folder:
        images = Path(folder) / "images"
        file.write('{"annotations": [')
        with images.open("w", encoding="utf-8") as listed:  # the second of two lists that grow together
            for image, instances in rows:
                entry = {
                    "id": image["image_id"],
                    "file_name": image["file_name"],
                    "height": image["height"],
                    "width": image["width"],
                }
                listed.write(("\n" if not counts["images"] else ",\n") + json.dumps(entry))
                counts["images"] += 1
                for instance in instances:
                    counts["instances"] += 1
                    annotation = as_annotation(instance, image["image_id"], counts["instances"])
                    file.write(("\n" if counts["instances"] == 1 else ",\n") + json.dumps(annotation))
        file.write('\n],\n"images": [')
        with images.open(encoding="utf-8") as listed:
            for line in listed:
                file.write(line)
        named = [{"id": index, "name": name} for index, name in sorted(categories.items())]
        file.write(f'\n],\n"categories": {json.dumps(named)}}}\n')
    return counts


def as_result(instance: Row, image_id: int) -> Row:
    """One instance as an entry of COCO's results."""
    box = as_xywh(np.array([[instance[name] for name in ("x1", "y1", "x2", "y2")]])).tolist()[0]
    found: Row = {
        "image_id": image_id,
        "category_id": instance["category_id"],
        "bbox": box,
        "score": instance["score"],
    }
    if instance["mask_rle"] is not None:
        size = [instance["mask_height"], instance["mask_width"]]
        found["segmentation"] = {"size": size, "counts": instance["mask_rle"]}
    if instance["keypoints"] is not None:
        found["keypoints"] = instance["keypoints"]
    return found


def as_annotation(instance: Row, image_id: int, annotation_id: int) -> Row:
    """One instance as an annotation of a COCO dataset."""
    found = as_result(instance, image_id) | {"id": annotation_id, "area": instance["area"], "iscrowd": 0}
    if "keypoints" in found:
        points = found["keypoints"]
        found["keypoints"] = [2 if index % 3 == 2 else value for index, value in enumerate(points)]
        found["num_keypoints"] = len(points) // 3
    return found


# ------------------------------------------------------------------------------------------------------------ Parquet


def file_metadata(results: Results) -> Iterator[dict[bytes, bytes]]:
    """The key-value metadata of one file for each of the weights and settings that rows of the table were made with."""
    seen: set[tuple[str, str]] = set()
    filesystem, root = storage.resolve(results.output)
    for commit in results.commits:
        if (made_with := (commit.weights_sha256, commit.settings_hash)) not in seen:
            seen.add(made_with)
            path = next(file.path for file in commit.files if file.table == "images")
            metadata = pq.read_schema(f"{root.rstrip('/')}/{path}", filesystem=filesystem).metadata
            yield {key: value for key, value in metadata.items() if key.startswith(b"maskline.")}


def write_parquet(results: Results, folder: str, *, where: str | None = None) -> Counter[str]:
    """Committed rows as ``images.parquet`` and ``instances.parquet``, which Hugging Face, pandas and Spark read.

    Their metadata is what all files of the table say alike: weights, classes, settings, conventions.
    """
    counts: Counter[str] = Counter()
    shared = (
        dict(set.intersection(*(set(found.items()) for found in file_metadata(results)))) if results.commits else {}
    )
    tables: list[tuple[Literal["images", "instances"], Any]] = [
        ("images", results.images()),
        ("instances", results.instances()),
    ]
    for name, dataset in tables:
        condition = f"WHERE ({where})" if where and name == "instances" else ""
        with duckdb.connect() as connection, _aside(storage.join(folder, f"{name}.parquet")) as path:
            connection.register(name, dataset)
            columns = ", ".join(SCHEMAS[name].names)
            schema = pa.schema([pa.field(field.name, field.type) for field in SCHEMAS[name]], metadata=shared)
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                try:
                    reader = connection.sql(f"SELECT {columns} FROM {name} {condition}").to_arrow_reader(65_536)
                except duckdb.Error as error:
                    raise _refused(error) from error
                for batch in reader:
                    writer.write_batch(pa.RecordBatch.from_arrays(batch.cast(schema).columns, schema=schema))
                    counts[name] += batch.num_rows
    return counts

"""The results table: its schema, the writing of one shard's rows, and the reading of committed rows only.

Two tables lie under one root, ``images`` and ``instances``, each a Parquet file per shard and attempt. The commits
(``pipeline/commits.py``) alone say which files count. The invariant: sum(images.num_instances) = count(instances).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from pipeline import commits, storage
from pipeline.commits import Commit, CommittedFile
from pipeline.errors import DecodeError
from pipeline.schema import DICTIONARY_COLUMNS, IMAGES_SCHEMA, INSTANCES_SCHEMA, SCHEMAS

if TYPE_CHECKING:
    from model.structures import Detections, ImageSize

ROW_GROUP_ROWS = 122_880
"""DuckDB's own vector-group size, so that each row group is one unit of its scan."""


@dataclass(frozen=True, kw_only=True)
class TableMetadata:
    """What is written into every file's key-value metadata, so that a file explains itself."""

    weights_name: str
    weights_sha256: str
    settings_hash: str
    settings: dict[str, Any]
    categories: dict[int, str]

    def encode(self) -> dict[str, str]:
        return {
            "maskline.format_version": str(commits.FORMAT_VERSION),
            "maskline.weights_name": self.weights_name,
            "maskline.weights_sha256": self.weights_sha256,
            "maskline.settings_hash": self.settings_hash,
            "maskline.settings": json.dumps(self.settings, sort_keys=True),
            "maskline.categories": json.dumps(self.categories, sort_keys=True),
            "maskline.bbox": "x1 y1 x2 y2, continuous pixels of the EXIF-oriented image, width = x2 - x1",
            "maskline.mask": "COCO compressed RLE, column-major, of the EXIF-oriented image",
        }


@dataclass
class ShardRows:
    """The rows of one shard as they come in, in any order; ``tables`` gives them in the order of the shard's items."""

    items: pa.Table
    shard_id: str
    run_id: str
    images: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """Item index → (status, reason, error, width, height, orientation, num_instances, bytes)."""
    detections: dict[int, Detections] = field(default_factory=dict)
    """Item index → its detections, where there are any."""

    def add_ok(self, index: int, size: ImageSize, orientation: int, num_bytes: int, detections: Detections) -> None:
        self.images[index] = ("ok", None, None, size.width, size.height, orientation, len(detections), num_bytes)
        if len(detections):
            self.detections[index] = detections

    def add_failed(self, index: int, error: DecodeError, num_bytes: int | None) -> None:
        self.images[index] = ("failed", error.reason, error.detail, None, None, None, 0, num_bytes)

    @property
    def num_instances(self) -> int:
        return sum(len(detections) for detections in self.detections.values())

    def failed_by_reason(self) -> dict[str, int]:
        counts: dict[str, int] = defaultdict(int)
        for row in self.images.values():
            if row[0] == "failed":
                counts[row[1]] += 1
        return dict(counts)

    def tables(self) -> dict[str, pa.Table]:
        """Both tables of the shard. Every item must have its row by now."""
        missing = set(range(self.items.num_rows)) - set(self.images)
        assert not missing, f"shard {self.shard_id}: {len(missing)} of {self.items.num_rows} items have no row"
        return {"images": self._images_table(), "instances": self._instances_table()}

    def _images_table(self) -> pa.Table:
        rows = [self.images[index] for index in range(self.items.num_rows)]
        columns = zip(*rows, strict=True)  # a shard is never empty
        fields = [IMAGES_SCHEMA.field(index) for index in range(4, len(IMAGES_SCHEMA))]
        count = len(rows)
        arrays = [
            self.items["image_key"].combine_chunks(),
            self.items["source_version"].combine_chunks(),
            pa.array([self.shard_id] * count, pa.string()),
            pa.array([self.run_id] * count, pa.string()),
            *(pa.array(column, kind.type) for column, kind in zip(columns, fields, strict=True)),
        ]
        return pa.table(arrays, schema=IMAGES_SCHEMA)

    def _instances_table(self) -> pa.Table:
        keys = self.items["image_key"]
        columns: dict[str, list[Any]] = {name: [] for name in INSTANCES_SCHEMA.names}
        for index in sorted(self.detections):
            found = self.detections[index]
            count = len(found)
            columns["image_key"] += [keys[index].as_py()] * count
            columns["instance_index"] += range(count)
            columns["category_id"] += found.category_ids.tolist()
            columns["category"] += found.categories
            columns["score"] += found.scores.tolist()
            for name, values in zip(("x1", "y1", "x2", "y2"), found.boxes.T.tolist(), strict=True):
                columns[name] += values
            columns["area"] += found.areas.tolist()
            columns["mask_height"] += [found.size.height] * count
            columns["mask_width"] += [found.size.width] * count
            columns["mask_rle"] += [mask["counts"].decode() for mask in found.masks] or [None] * count
            columns["keypoints"] += (
                [None] * count if found.keypoints is None else found.keypoints.reshape(count, -1).tolist()
            )
        return pa.table(
            {name: pa.array(columns[name], INSTANCES_SCHEMA.field(name).type) for name in columns},
            schema=INSTANCES_SCHEMA,
        )


def write_table(
    output: str,
    table_name: Literal["images", "instances"],
    table: pa.Table,
    file_name: str,
    metadata: TableMetadata,
    run_id: str,
) -> CommittedFile:
    """Write one table of one attempt under a name that nothing else ever uses; it counts only once it is committed."""
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata(metadata.encode())
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=DICTIONARY_COLUMNS[table_name],
    )
    data = sink.getvalue().to_pybytes()
    path = f"{table_name}/run={run_id}/{file_name}.parquet"
    storage.write_bytes(storage.join(output, path), data)
    return CommittedFile(
        table=table_name, path=path, bytes=len(data), rows=table.num_rows, sha256=hashlib.sha256(data).hexdigest()
    )


FILES_PER_DATASET = 2_000


class Results:
    """The committed rows of one table, as pyarrow datasets. Later runs supersede earlier rows of the same image."""

    def __init__(self, output: str, committed: list[Commit]) -> None:
        self.output = output
        self.commits = committed
        self._superseded: dict[str, pa.Array] | None = None

    def of_run(self, run_id: str) -> Results:
        """What one run committed, whatever superseded it since."""
        return Results(self.output, [commit for commit in self.commits if commit.run_id == run_id])

    def images(self) -> pds.Dataset:
        """One row for each image."""
        return self._visible("images")

    def instances(self) -> pds.Dataset:
        """One row for each instance of those images."""
        return self._visible("instances")

    def all_images(self) -> Iterator[pds.Dataset]:
        """Committed image rows with the superseded ones among them, so many files at a time.

        A dataset keeps the metadata of each file that it has read: of 100,000 files at once, four gigabytes.
        """
        for start in range(0, len(self.commits), FILES_PER_DATASET):
            yield self._dataset("images", self.commits[start : start + FILES_PER_DATASET])

    def _visible(self, table: Literal["images", "instances"]) -> pds.Dataset:
        dataset = self._dataset(table, self.commits)
        if self._superseded is None:
            self._superseded = self._find_superseded()
        hidden = [
            (pc.field("run") == run_id) & pc.field("image_key").isin(keys) for run_id, keys in self._superseded.items()
        ]
        return dataset.filter(~reduce(lambda left, right: left | right, hidden)) if hidden else dataset

    def _dataset(self, table: Literal["images", "instances"], committed: Sequence[Commit]) -> pds.Dataset:
        filesystem, root = storage.resolve(self.output)
        paths = [f"{root.rstrip('/')}/{file.path}" for file in commits.iterate_files(committed, table)]
        schema = SCHEMAS[table].append(pa.field("run", pa.string()))  # from the folder's name: run=<run_id>
        partitioning = pds.partitioning(pa.schema([("run", pa.string())]), flavor="hive")
        return pds.dataset(
            paths,
            schema=schema,
            format="parquet",
            filesystem=filesystem,
            partitioning=partitioning,
            partition_base_dir=f"{root.rstrip('/')}/{table}",
        )

    def _find_superseded(self) -> dict[str, pa.Array]:
        """For each run, the keys that a later run committed again. Within one run a key stands once."""
        if len({commit.run_id for commit in self.commits}) < 2:
            return {}
        import duckdb

        connection = duckdb.connect()
        connection.execute("CREATE TABLE committed (run_id VARCHAR, image_key VARCHAR)")
        for images in self.all_images():
            connection.register("images", images)
            connection.execute("INSERT INTO committed SELECT run_id, image_key FROM images")
        rows = connection.sql(
            "SELECT run_id, list(image_key) AS keys FROM ("
            "  SELECT run_id, image_key FROM committed"
            "  QUALIFY row_number() OVER (PARTITION BY image_key ORDER BY run_id DESC) > 1"
            ") GROUP BY run_id"
        ).to_arrow_table()
        keys = rows["keys"]
        return {run_id.as_py(): keys[index].values for index, run_id in enumerate(rows["run_id"])}


def open_results(output: str) -> Results:
    """Open a results table for reading: committed rows only, each image once.

    Args:
        output: the table's root, any fsspec URI.

    Raises:
        ConfigError: there is no results table of this version there.
    """
    commits.check_table(output)
    return Results(output, commits.read_commits(output))


def hash_columns(*columns: Sequence[Any] | pa.ChunkedArray) -> str:
    """A sha256 over columns of strings, their lengths included, so that no two inputs share a spelling."""
    digest = hashlib.sha256()
    for column in columns:
        for value in column.to_pylist() if isinstance(column, pa.ChunkedArray) else column:
            encoded = str(value).encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        digest.update(b"\xff" * 8)
    return digest.hexdigest()

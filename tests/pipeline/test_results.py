from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.structures import Detections, ImageSize
from pipeline import commits, results
from pipeline.archive import ITEM_SCHEMA
from pipeline.commits import Commit
from pipeline.errors import ConfigError, DecodeError
from pipeline.results import ShardRows, TableMetadata
from pipeline.schema import INSTANCES_SCHEMA

METADATA = TableMetadata(
    weights_name="w", weights_sha256="1", settings_hash="2", settings={"a": 1}, categories={1: "cat"}
)


def make_items(keys: list[str]) -> pa.Table:
    rows = [
        {
            "image_key": key,
            "source_version": "v",
            "kind": "file",
            "container": key,
            "member": "",
            "offset": 0,
            "bytes": 5,
            "error": None,
        }
        for key in keys
    ]
    return pa.Table.from_pylist(rows, schema=ITEM_SCHEMA)


def make_detections(count: int, keypoints: int | None = None) -> Detections:
    return Detections(
        size=ImageSize(4, 6),
        boxes=np.arange(4 * count, dtype=np.float32).reshape(count, 4),
        scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
        category_ids=np.arange(count, dtype=np.int64),
        categories=[f"c{index}" for index in range(count)],
        masks=[{"size": [4, 6], "counts": f"m{index}".encode()} for index in range(count)],
        areas=np.full(count, 7, np.int64),
        keypoints=None if keypoints is None else np.ones((count, keypoints, 3), np.float32),
    )


def commit_rows(output: Path, keys: list[str], *, run_id: str, shard_id: str, instances: int) -> None:
    rows = ShardRows(make_items(keys), shard_id, run_id)
    for index in range(len(keys)):
        rows.add_ok(index, ImageSize(4, 6), 1, 5, make_detections(instances))
    tables = rows.tables()
    files = tuple(
        results.write_table(str(output), name, tables[name], f"{shard_id}-a", METADATA, run_id)
        for name in ("images", "instances")
    )
    commit = Commit(
        shard_id=shard_id,
        attempt_id="a",
        run_id=run_id,
        weights_sha256="1",
        settings_hash="2",
        inputs_hash="3",
        images=len(keys),
        failed_by_reason={},
        instances=rows.num_instances,
        files=files,
    )
    commits.create_table(str(output))
    commits.publish(str(output), commit, exclusive=True)


def test_rows_come_out_in_the_order_of_items_whatever_order_they_came_in() -> None:
    rows = ShardRows(make_items(["a", "b", "c"]), "s", "r")
    rows.add_ok(2, ImageSize(4, 6), 3, 50, make_detections(2))
    rows.add_failed(1, DecodeError("truncated", "cut"), 9)
    rows.add_ok(0, ImageSize(4, 6), 1, 50, make_detections(1))
    images, instances = rows.tables()["images"].to_pylist(), rows.tables()["instances"].to_pylist()
    assert [row["image_key"] for row in images] == ["a", "b", "c"]
    assert [row["status"] for row in images] == ["ok", "failed", "ok"]
    assert (images[1]["reason"], images[1]["error"], images[1]["bytes"], images[1]["width"]) == (
        "truncated",
        "cut",
        9,
        None,
    )
    assert (images[2]["width"], images[2]["height"], images[2]["orientation"]) == (6, 4, 3)
    assert [(row["image_key"], row["instance_index"]) for row in instances] == [("a", 0), ("c", 0), ("c", 1)]
    assert instances[2]["mask_rle"] == "m1"
    assert (instances[2]["x1"], instances[2]["y2"], instances[2]["area"]) == (4.0, 7.0, 7)
    assert sum(row["num_instances"] for row in images) == len(instances)
    assert rows.failed_by_reason() == {"truncated": 1}


def test_an_item_without_a_row_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="1 of 1 items"):
        ShardRows(make_items(["a"]), "s", "r").tables()


def test_a_shard_without_instances_keeps_the_schema(tmp_path: Path) -> None:
    rows = ShardRows(make_items(["a"]), "s", "r")
    rows.add_failed(0, DecodeError("empty", ""), 0)
    file = results.write_table(str(tmp_path), "instances", rows.tables()["instances"], "x", METADATA, "r")
    found = pq.read_table(tmp_path / file.path, partitioning=None)
    assert found.num_rows == 0
    assert found.schema.equals(INSTANCES_SCHEMA)


def test_keypoints_are_flattened_per_instance() -> None:
    rows = ShardRows(make_items(["a"]), "s", "r")
    rows.add_ok(0, ImageSize(4, 6), 1, 5, make_detections(2, keypoints=3))
    assert rows.tables()["instances"]["keypoints"].to_pylist() == [[1.0] * 9] * 2


def test_a_file_explains_itself_and_matches_its_record(tmp_path: Path) -> None:
    rows = ShardRows(make_items(["a"]), "s", "r")
    rows.add_ok(0, ImageSize(4, 6), 1, 5, make_detections(1))
    file = results.write_table(str(tmp_path), "images", rows.tables()["images"], "x", METADATA, "r")
    data = (tmp_path / file.path).read_bytes()
    assert (file.bytes, file.rows, file.sha256) == (len(data), 1, hashlib.sha256(data).hexdigest())
    stored = pq.ParquetFile(tmp_path / file.path)
    assert stored.schema_arrow.metadata[b"maskline.weights_sha256"] == b"1"
    assert stored.metadata.row_group(0).column(0).compression == "ZSTD"


def test_readers_see_committed_rows_only(tmp_path: Path) -> None:
    commit_rows(tmp_path, ["a", "b"], run_id="r1", shard_id="s1", instances=2)
    results.write_table(str(tmp_path), "images", make_items_table("z"), "stray", METADATA, "r1")
    opened = results.open_results(str(tmp_path))
    assert opened.images().to_table()["image_key"].to_pylist() == ["a", "b"]
    assert opened.instances().count_rows() == 4


def make_items_table(key: str) -> pa.Table:
    rows = ShardRows(make_items([key]), "stray", "r1")
    rows.add_ok(0, ImageSize(4, 6), 1, 5, make_detections(0))
    return rows.tables()["images"]


def test_a_later_run_supersedes_rows_of_the_same_image(tmp_path: Path) -> None:
    commit_rows(tmp_path, ["a", "b"], run_id="r1", shard_id="s1", instances=2)
    commit_rows(tmp_path, ["b", "c"], run_id="r2", shard_id="s2", instances=1)
    commit_rows(tmp_path, ["c"], run_id="r3", shard_id="s3", instances=5)
    opened = results.open_results(str(tmp_path))
    images = {row["image_key"]: row for row in opened.images().to_table().to_pylist()}
    assert {key: row["run_id"] for key, row in images.items()} == {"a": "r1", "b": "r2", "c": "r3"}
    assert opened.images().count_rows() == 3
    assert opened.instances().count_rows() == 2 + 1 + 5 == sum(row["num_instances"] for row in images.values())


def test_an_empty_table_reads_as_no_rows(tmp_path: Path) -> None:
    commits.create_table(str(tmp_path))
    assert results.open_results(str(tmp_path)).images().to_table().num_rows == 0


def test_a_folder_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a results table"):
        results.open_results(str(tmp_path))

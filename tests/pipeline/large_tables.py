"""Synthetic listings and tables of any size, and what planning over them takes.

``python -m tests.pipeline.large_tables IMAGES [TABLE]`` is a process of its own: its highest memory is the plan's.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import commits
from pipeline.commits import Commit, CommittedFile
from pipeline.items import ITEM_SCHEMA, ROWS_PER_BATCH
from pipeline.results import Results
from pipeline.schema import DICTIONARY_COLUMNS, IMAGES_SCHEMA
from pipeline.shards import Plan, ShardConfig

IMAGES_PER_COMMIT = 20


def keys_of(numbers: range) -> list[str]:
    return [f"s3://a-bucket-of-photographs/2026/11/{n // 1000:05d}/photograph-{n:08d}.jpg" for n in numbers]


def versions_of(numbers: range) -> list[str]:
    return [f"{n * 2654435761 % 2**64:032x}" for n in numbers]


def listing(count: int) -> Iterator[pa.RecordBatch]:
    """As many images, in the batches of a real listing."""
    for start in range(0, count, ROWS_PER_BATCH):
        numbers = range(start, min(count, start + ROWS_PER_BATCH))
        size, keys = len(numbers), pa.array(keys_of(numbers))
        files, blank = pa.array(["file"] * size), pa.array([""] * size)
        offsets, sizes = pa.array([0] * size), pa.array([150_000] * size)
        yield pa.record_batch(
            [keys, pa.array(versions_of(numbers)), files, keys, blank, offsets, sizes, pa.nulls(size, pa.string())],
            schema=ITEM_SCHEMA,
        )


def write_table(table: Path, num_commits: int) -> None:
    """What so many shards of the first images would have left; nothing is synced to the disk."""
    commits.create_table(str(table))
    (table / "_commits").mkdir()
    folder = table / "images" / "run=r1"
    folder.mkdir(parents=True)
    for number in range(num_commits):
        shard, numbers = f"{number:032x}", range(number * IMAGES_PER_COMMIT, (number + 1) * IMAGES_PER_COMMIT)
        path = folder / f"{shard}-a.parquet"
        pq.write_table(_rows(shard, numbers), path, use_dictionary=DICTIONARY_COLUMNS["images"])
        file = CommittedFile(
            table="images", path=f"images/run=r1/{path.name}", bytes=path.stat().st_size, rows=len(numbers), sha256=""
        )
        commit = Commit(
            shard_id=shard,
            attempt_id="a",
            run_id="r1",
            weights_sha256="1",
            settings_hash="2",
            inputs_hash="3",
            images=len(numbers),
            failed_by_reason={},
            instances=0,
            files=(file,),
        )
        (table / "_commits" / f"{shard}.json").write_bytes(commit.to_json())


def _rows(shard: str, numbers: range) -> pa.Table:
    size = len(numbers)
    columns = {
        "image_key": keys_of(numbers),
        "source_version": versions_of(numbers),
        "shard_id": [shard] * size,
        "run_id": ["r1"] * size,
        "status": ["ok"] * size,
        "num_instances": [0] * size,
    }
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(size, field.type)
        for field in IMAGES_SCHEMA
    ]
    return pa.table(arrays, schema=IMAGES_SCHEMA)


def main(num_images: int, table: str = "") -> None:
    """Plan so many images over a table, and print as JSON what it took."""
    began = time.perf_counter()
    for _ in listing(num_images):
        pass
    listing_seconds = time.perf_counter() - began
    began = time.perf_counter()
    committed = commits.read_table(table) if table else []
    results = Results(table or "memory://none", committed)
    with Plan(listing(num_images), results, weights_sha256="1", settings_hash="2", config=ShardConfig()) as plan:
        plan_seconds = time.perf_counter() - began
        found = {
            "listed": plan.images_listed,
            "done": plan.images_done,
            "cut": sum(shard.num_images for shard in plan.shards()),
            "commits": len(committed),
            "listing_seconds": round(listing_seconds, 1),
            "plan_seconds": round(plan_seconds, 1),
            "shards_seconds": round(time.perf_counter() - began - plan_seconds, 1),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])

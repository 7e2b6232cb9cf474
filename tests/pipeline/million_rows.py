"""A table of a million instances, written column by column."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import commits, results
from pipeline.commits import Commit
from pipeline.schema import SCHEMAS
from pipeline.summary import Summary
from tests.pipeline.made_up_tables import CATEGORIES, METADATA

IMAGES_PER_SHARD = 2_000
PER_IMAGE = 10


def write_million(output: str, run_id: str, num_images: int = 100_000) -> None:
    """Ten instances in each of so many images that lie nowhere; a thousandth of the images failed."""
    commits.create_table(output)
    chance = np.random.default_rng(0)
    for shard in range(num_images // IMAGES_PER_SHARD):
        numbers = np.arange(shard * IMAGES_PER_SHARD, (shard + 1) * IMAGES_PER_SHARD)
        keys = [
            f"s3://photographs/2026/{number // 1000:04d}/photograph-{number:07d}.jpg" for number in numbers.tolist()
        ]
        failed = numbers % 1000 == 500
        images = _table("images", len(keys), {
            "image_key": keys, "source_version": ["v"] * len(keys), "shard_id": [f"{run_id}-{shard}"] * len(keys),
            "run_id": [run_id] * len(keys), "status": np.where(failed, "failed", "ok").tolist(),
            "reason": [("truncated" if one else None) for one in failed.tolist()],
            "width": [640] * len(keys), "height": [480] * len(keys),
            "num_instances": np.where(failed, 0, PER_IMAGE).tolist(),
        })  # fmt: skip
        own = np.repeat(np.array(keys)[~failed], PER_IMAGE)
        ids = chance.integers(1, 3, len(own))
        instances = _table("instances", len(own), {
            "image_key": own.tolist(), "instance_index": np.tile(np.arange(PER_IMAGE), (~failed).sum()).tolist(),
            "category_id": ids.tolist(), "category": [CATEGORIES[one] for one in ids.tolist()],
            "score": chance.random(len(own)).tolist(), "area": chance.integers(10, 90_000, len(own)).tolist(),
            **{name: [0.0] * len(own) for name in ("x1", "y1", "x2", "y2")},
            "mask_height": [480] * len(own), "mask_width": [640] * len(own), "mask_rle": ["PdZ9"] * len(own),
        })  # fmt: skip
        files = (
            results.write_table(output, "images", images, f"{run_id}-{shard}-a", METADATA, run_id),
            results.write_table(output, "instances", instances, f"{run_id}-{shard}-a", METADATA, run_id),
        )
        commit = Commit(
            shard_id=f"{run_id}-{shard}", attempt_id="a", run_id=run_id, weights_sha256="1", settings_hash="2",
            inputs_hash="i", images=len(keys), failed_by_reason={"truncated": int(failed.sum())}, instances=len(own),
            files=files,
        )  # fmt: skip
        commits.publish(output, commit, exclusive=True)
    summary = Summary(
        run_id=run_id, output=output, images_listed=num_images, images_already_done=0, images_planned=num_images
    )
    runs = Path(output) / "_runs"
    runs.mkdir(exist_ok=True)
    (runs / f"{run_id}.json").write_text(json.dumps(asdict(summary)))


def _table(name: str, size: int, columns: Mapping[str, Any]) -> pa.Table:
    schema = SCHEMAS[name]
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(size, field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)

"""Results tables without a model: drawn images in a folder, and runs that found in them what a test says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from model.structures import Detections, ImageSize
from pipeline import commits, results
from pipeline.commits import Commit
from pipeline.errors import DecodeError
from pipeline.results import ShardRows, TableMetadata
from pipeline.summary import Summary
from pipeline.timeline import Timeline
from tests.pipeline.archives import listed

SIZE = ImageSize(48, 64)
CATEGORIES = {1: "disc", 2: "ring"}
METADATA = TableMetadata(weights_name="w", weights_sha256="1", settings_hash="2", settings={}, categories=CATEGORIES)


def write_images(folder: Path, names: Sequence[str]) -> None:
    """A grey ramp each."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        ramp = np.arange(SIZE.width, dtype=np.uint8)[None, :, None] * np.uint8(1 + index % 3)
        Image.fromarray(np.broadcast_to(ramp, (*SIZE, 3)).copy()).save(folder / name)


def found(scores: Sequence[float], chance: np.random.Generator) -> Detections:
    """So many rectangles, each with its score and one of two categories."""
    from pycocotools import mask as coco_mask

    scores = sorted(scores, reverse=True)
    boxes = np.array([_box(chance) for _ in scores], np.float32).reshape(-1, 4)
    masks, areas = [], []
    for x1, y1, x2, y2 in boxes.astype(int).tolist():
        mask = np.zeros(SIZE, np.uint8, order="F")
        mask[y1:y2, x1:x2] = 1
        masks.append(coco_mask.encode(mask))
        areas.append(int(mask.sum()))
    ids = chance.integers(1, 3, len(scores))
    return Detections(
        size=SIZE, boxes=boxes, scores=np.array(scores, np.float32), category_ids=ids,
        categories=[CATEGORIES[one] for one in ids.tolist()], masks=masks, areas=np.array(areas, np.int64),
    )  # fmt: skip


def _box(chance: np.random.Generator) -> list[int]:
    x1, y1 = int(chance.integers(0, SIZE.width - 8)), int(chance.integers(0, SIZE.height - 8))
    return [
        x1,
        y1,
        x1 + int(chance.integers(4, SIZE.width - x1 + 1)),
        y1 + int(chance.integers(4, SIZE.height - y1 + 1)),
    ]


def add_run(
    output: str, run_id: str, archive: str, scores: Mapping[str, Sequence[float] | DecodeError], *, seed: int = 0
) -> Summary:
    """Commit a row for each image of the archive, with instances of those `scores` by the name of its file."""
    chance = np.random.default_rng(seed)
    names = [key.rpartition("/")[2] for key in listed(archive)["image_key"].to_pylist()]
    given = {name: found(one, chance) if not isinstance(one := scores[name], DecodeError) else one for name in names}
    return add_detections(output, run_id, archive, given)


def add_detections(output: str, run_id: str, archive: str, given: Mapping[str, Detections | DecodeError]) -> Summary:
    """The same with what was found in each image."""
    commits.create_table(output)
    items = listed(archive)
    rows = ShardRows(items, f"s-{run_id}", run_id)
    for index, key in enumerate(items["image_key"].to_pylist()):
        detections = given[key.rpartition("/")[2]]
        if isinstance(detections, DecodeError):
            rows.add_failed(index, detections, 9)
        else:
            rows.add_ok(index, SIZE, 1, 900, detections)
    tables = rows.tables()
    files = tuple(
        results.write_table(output, name, tables[name], f"s-{run_id}-a", METADATA, run_id)
        for name in ("images", "instances")
    )
    failed = rows.failed_by_reason()
    commit = Commit(
        shard_id=f"s-{run_id}", attempt_id="a", run_id=run_id, weights_sha256="1", settings_hash="2", inputs_hash="i",
        images=items.num_rows, failed_by_reason=failed, instances=rows.num_instances, files=files,
    )  # fmt: skip
    assert commits.publish(output, commit, exclusive=True) == "won"
    timeline = Timeline()
    timeline.add(
        3.0, seconds=3.0, images=items.num_rows, stages={"fetch": 0.5, "decode": 1.5, "model": 0.5, "commit": 0.1}
    )
    summary = Summary(
        run_id=run_id, output=output, weights_name="w", images_listed=items.num_rows, images_already_done=0,
        images_planned=items.num_rows, images_ok=items.num_rows - sum(failed.values()),
        images_failed=sum(failed.values()), failed_by_reason=failed, instances=rows.num_instances, shards_planned=1,
        shards_committed=1, seconds=5.0, run_seconds=3.0, images_per_second=items.num_rows / 3.0, actors=1,
        model_busy=0.2, batch_size=4, stage_seconds={"fetch": 0.5, "decode": 1.5, "model": 0.5, "commit": 0.1},
    )  # fmt: skip
    record = asdict(summary) | {"timeline": asdict(timeline)}
    runs = Path(output) / "_runs"
    runs.mkdir(exist_ok=True)
    (runs / f"{run_id}.json").write_text(json.dumps(record))
    return summary

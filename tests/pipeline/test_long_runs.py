"""Two days of a run, by a simulated clock in the driver and shard by shard in an actor: memory stays as it was."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import commits, schedule, workers
from pipeline.archive import ITEM_SCHEMA
from pipeline.schedule import Schedule, ScheduleConfig, Tick
from pipeline.segment_actor import SegmentActor
from pipeline.shard_attempts import ActorConfig, Attempt
from pipeline.shards import Shard
from tests.pipeline.archives import listed
from tests.pipeline.simulated_ray import SHARD_SECONDS, SimulatedClock, SimulatedRay
from tests.pipeline.test_results import METADATA
from tests.reference import processes
from tests.reference.tiny_segmenter import load_tiny

HOUR = 3600.0
ACTORS = 4
DEATH_RATE = 0.002
"""Of actors, over a shard."""


def run_of(hours: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Schedule, list[int]]:
    """A schedule that has run for so long, and how many objects the process held at each of its hours."""
    clock, objects = SimulatedClock(), list[int]()
    monkeypatch.setattr(schedule, "time", clock)
    monkeypatch.setattr(workers, "time", clock)
    monkeypatch.setattr(workers, "ray", SimulatedRay(clock, death_rate=DEATH_RATE))
    num_shards = int(hours * HOUR * ACTORS / (sum(SHARD_SECONDS) / 2))
    shards = (Shard(shard_id=f"{n:032x}", items=ITEM_SCHEMA.empty_table(), inputs_hash="i") for n in range(num_shards))
    config = ActorConfig(output="o", run_id="r", score_threshold=0.5, metadata=METADATA)
    run = Schedule(
        iter(shards), num_shards, load_tiny, config,
        ScheduleConfig(min_actors=ACTORS, max_actors=ACTORS),
    )  # fmt: skip

    def count(tick: Tick) -> None:
        if clock.now >= (len(objects) + 1) * HOUR and tick.shards_done < num_shards - 100:
            gc.collect()
            objects.append(len(gc.get_objects()))

    run.run(count, threading.Event())
    assert run.result.done.shards == num_shards
    assert run.result.num_actor_deaths > DEATH_RATE * num_shards / 2
    return run, objects


def test_three_hours_of_deaths_finish_every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_of(3, monkeypatch)
    assert run.result.done.images == 100 * run.result.done.shards
    assert not run.result.given_up


@pytest.mark.slow
def test_a_driver_holds_no_more_after_two_days_than_after_three_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    run, objects = run_of(48, monkeypatch)
    shards, deaths = run.result.done.shards, run.result.num_actor_deaths
    print(f"{shards} shards, {deaths} deaths, objects {objects[2]} to {objects[-1]}")  # noqa: T201
    assert len(objects) >= 40
    # what stays is one record for each actor that ever lived
    assert max(objects[3:]) - objects[2] < 500 + 3 * deaths


def make_shard(archive: Path, number: int) -> Shard:
    return Shard(shard_id=f"{number:032x}", items=listed(str(archive)), inputs_hash="i")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(pixels.integers(0, 255, (120, 160, 3), np.uint8)).save(folder / f"{index}.jpg")
    (folder / "bad.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.slow
def test_an_actor_holds_no_more_after_two_days_of_shards(tmp_path: Path, photographs: Path) -> None:
    """4,320 shards of 40 s are two days."""
    output = str(tmp_path / "out")
    commits.create_table(output)
    actor = SegmentActor(load_tiny, ActorConfig(output=output, run_id="r", score_threshold=0.0, metadata=METADATA))
    actor.ready()
    shard, resident = make_shard(photographs, 0), list[int]()
    for number in range(4_320):
        outcome = actor.segment(
            Shard(shard_id=f"{number:032x}", items=shard.items, inputs_hash="i"), Attempt(attempt_id="a", urgency=0)
        )
        assert (outcome.commit, outcome.images) == ("won", 7)
        if number % 480 == 479:
            resident.append(processes.resident_bytes())
    print(f"resident: {[round(size / 1e6) for size in resident]} MB")  # noqa: T201
    assert resident[-1] - resident[1] < 24e6

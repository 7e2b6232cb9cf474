"""The schedule on a real local Ray, with real deaths."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from pipeline import cluster, commits, schedule
from pipeline.archive import list_images
from pipeline.decode import decode
from pipeline.errors import ConfigError, PipelineError
from pipeline.isolated_decoder import Decode
from pipeline.results import Results, TableMetadata, open_results
from pipeline.schedule import Schedule, ScheduleConfig, ScheduleResult, Tick
from pipeline.segmenter import Segmenter
from pipeline.shard_attempts import ActorConfig
from pipeline.shards import Plan, ShardConfig
from pipeline.summary import Summary
from tests.pipeline.poison import HANGS, KILLS, decode_poisoned
from tests.reference import processes
from tests.reference.tiny_segmenter import load_broken, load_cramped, load_slow, load_tiny

METADATA = TableMetadata(weights_name="t", weights_sha256="1", settings_hash="2", settings={}, categories={1: "bright"})
NUM_IMAGES = 24


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    cluster.connect(None)
    yield
    ray.shutdown()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        Image.fromarray(pixels.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / f"{index:02d}.png")
    return folder


def run(
    archive: Path,
    output: Path,
    *,
    load: Callable[[], Segmenter] = load_tiny,
    decoder: Decode = decode,
    on_tick: Callable[[Tick], None] = lambda _: None,
    stop: threading.Event | None = None,
    run_id: str = "r1",
    suspect: bool = False,
    actors: int = 1,
    images_per_shard: int = 4,
    stall_timeout_seconds: float = 600.0,
    cpus_per_actor: float = 0.5,
) -> ScheduleResult:
    plan = Plan(
        list_images([str(archive)]),
        Results(str(output), commits.read_table(str(output))),
        weights_sha256="1",
        settings_hash="2",
        config=ShardConfig(images_per_shard=images_per_shard),
    )
    commits.create_table(str(output))
    actor_config = ActorConfig(
        output=str(output),
        run_id=run_id,
        score_threshold=0.0,
        metadata=METADATA,
        decode=decoder,
        decode_timeout_seconds=3.0,
    )
    schedule = Schedule(
        plan.shards(),
        plan.num_shards,
        load,
        actor_config,
        ScheduleConfig(
            min_actors=actors,  # whichever a test picks has shards
            max_actors=actors,
            cpus_per_actor=cpus_per_actor,
            grace_seconds=10,
            stall_timeout_seconds=stall_timeout_seconds,
        ),
        is_suspect=lambda _: suspect,
    )
    with plan:
        return schedule.run(on_tick, stop or threading.Event())


def keys_of(output: Path) -> list[str]:
    rows = open_results(str(output)).images().to_table().to_pylist()
    assert sum(row["num_instances"] for row in rows) == open_results(str(output)).instances().count_rows()
    return sorted(Path(row["image_key"]).name for row in rows)


ALL_KEYS = [f"{index:02d}.png" for index in range(NUM_IMAGES)]


def test_out_of_device_memory_halves_batches_and_is_told(archive: Path, tmp_path: Path) -> None:
    result = run(archive, tmp_path / "out", load=load_cramped)
    assert keys_of(tmp_path / "out") == ALL_KEYS
    assert not result.num_retries
    summary = Summary(run_id="r1", output="o", images_listed=24, images_already_done=0, images_planned=24)
    summary.fill(result)
    assert summary.batch_size == 4
    assert summary.batch_halvings == 2  # from 4 to 2, from 2 to 1, and then it is known
    assert 0 < summary.model_busy < 1
    assert summary.actors == 1


def signal_one_actor(number: signal.Signals) -> Callable[[Tick], None]:
    """On the first tick with finished images, sends a signal to one actor process, once."""
    sent: list[int] = []

    def on_tick(tick: Tick) -> None:
        if tick.images_done and not sent:
            sent.append(processes.named("ray::SegmentActor")[0])
            os.kill(sent[0], number)

    return on_tick


def test_every_image_gets_one_row(archive: Path, tmp_path: Path) -> None:
    result = run(archive, tmp_path / "out", actors=2)
    assert keys_of(tmp_path / "out") == ALL_KEYS
    assert result.done.commits == {"won": 6}
    assert result.num_retries == result.num_actor_deaths == 0


@pytest.mark.slow  # tests/chaos kills and freezes them in every run of the tests
def test_what_waits_for_the_model_is_told(archive: Path, tmp_path: Path) -> None:
    told: list[int] = []
    run(archive, tmp_path / "out", load=load_slow, on_tick=lambda tick: told.append(tick.queued_bytes))
    assert 0 < max(told) <= NUM_IMAGES * 20 * 30 * 3
    assert min(told) >= 0


def test_a_killed_actor_is_replaced_and_nothing_is_lost_or_doubled(archive: Path, tmp_path: Path) -> None:
    result = run(archive, tmp_path / "out", load=load_slow, on_tick=signal_one_actor(signal.SIGKILL))
    assert result.num_actor_deaths == 1
    assert not result.given_up
    assert keys_of(tmp_path / "out") == ALL_KEYS


@pytest.mark.slow
def test_a_frozen_actor_s_shards_go_to_another(archive: Path, tmp_path: Path) -> None:
    result = run(
        archive,
        tmp_path / "out",
        load=load_slow,
        actors=2,
        on_tick=signal_one_actor(signal.SIGSTOP),
        stall_timeout_seconds=8.0,
    )
    assert result.num_retries >= 1
    assert keys_of(tmp_path / "out") == ALL_KEYS


def test_a_poison_image_costs_one_row(archive: Path, tmp_path: Path) -> None:
    with (archive / "05.png").open("ab") as file:
        file.write(KILLS)
    with (archive / "13.png").open("ab") as file:
        file.write(HANGS)
    result = run(archive, tmp_path / "out", decoder=decode_poisoned, stall_timeout_seconds=10.0)
    assert not result.given_up
    rows = open_results(str(tmp_path / "out")).images().to_table().to_pylist()
    failed = {Path(row["image_key"]).name: row["reason"] for row in rows if row["status"] == "failed"}
    assert failed == {"05.png": "killed_worker", "13.png": "timeout"}
    assert keys_of(tmp_path / "out") == ALL_KEYS


@pytest.mark.slow
def test_four_poison_images_of_two_thousand_cost_four_rows(tmp_path: Path) -> None:
    archive, output = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    pixels = np.random.default_rng(0)
    for index in range(2_000):
        Image.fromarray(pixels.integers(0, 255, (20, 30, 3), np.uint8)).save(archive / f"{index:04d}.png")
    poisons = {"0101.png": KILLS, "0750.png": KILLS, "1499.png": HANGS, "1903.png": KILLS}
    for name, mark in poisons.items():
        with (archive / name).open("ab") as file:
            file.write(mark)
    result = run(archive, output, decoder=decode_poisoned, actors=2, images_per_shard=100, stall_timeout_seconds=10.0)
    assert not result.given_up
    rows = open_results(str(output)).images().to_table().to_pylist()
    reasons = {Path(row["image_key"]).name: row["reason"] for row in rows if row["status"] == "failed"}
    assert reasons == {name: "killed_worker" if mark == KILLS else "timeout" for name, mark in poisons.items()}
    assert len(keys_of(output)) == len(set(keys_of(output))) == 2_000
    attempts = commits.count_attempts(str(output))
    own = {row["shard_id"] for row in rows if row["status"] == "failed"}
    assert len(attempts) == 20
    assert max(times for shard, times in attempts.items() if shard not in own) <= 2
    print(f"attempts: {sorted(attempts.values())}, deaths {result.num_actor_deaths}")  # noqa: T201


def test_suspect_mode_gives_the_same_instances(archive: Path, tmp_path: Path) -> None:
    run(archive, tmp_path / "plain")
    run(archive, tmp_path / "suspect", suspect=True)
    tables = [
        open_results(str(tmp_path / name)).instances().to_table().drop_columns(["run"]) for name in ("plain", "suspect")
    ]
    assert tables[0].num_rows > 0
    assert tables[0].sort_by("image_key").equals(tables[1].sort_by("image_key"))


def test_a_model_that_cannot_be_loaded_ends_the_run_at_once(archive: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(PipelineError, match="these weights are broken"):
        run(archive, tmp_path / "out", load=load_broken)
    assert time.monotonic() - started < 30


def test_a_cluster_without_room_is_complained_of(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(schedule, "WAIT_SECONDS", 0.5)
    stop = threading.Event()
    result = run(
        archive,
        tmp_path / "out",
        cpus_per_actor=4096,
        on_tick=lambda _: stop.set() if "no shard is handed out yet" in caplog.text else None,
        stop=stop,
    )
    assert result.stopped
    assert "actors=0 of=1 cpus_each=4096" in caplog.text


def test_stopping_hands_out_nothing_more_and_the_next_run_does_the_rest(archive: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    first = run(
        archive,
        tmp_path / "out",
        load=load_slow,
        on_tick=lambda tick: stop.set() if tick.images_done else None,
        stop=stop,
    )
    assert first.stopped
    done = keys_of(tmp_path / "out")
    assert 0 < len(done) < NUM_IMAGES
    second = run(archive, tmp_path / "out", run_id="r2")
    assert second.done.images == NUM_IMAGES - len(done)
    assert keys_of(tmp_path / "out") == ALL_KEYS


def test_a_shard_that_another_run_committed_meanwhile_is_found(archive: Path, tmp_path: Path) -> None:
    plans = [
        Plan(
            list_images([str(archive)]),
            Results(str(tmp_path / "out"), []),
            weights_sha256="1",
            settings_hash="2",
            config=ShardConfig(images_per_shard=4),
        )
        for _ in range(2)
    ]
    commits.create_table(str(tmp_path / "out"))
    outcomes = []
    for number, plan in enumerate(plans):  # both planned before either ran
        config = ActorConfig(output=str(tmp_path / "out"), run_id=f"r{number}", score_threshold=0.0, metadata=METADATA)
        schedule = Schedule(
            plan.shards(), plan.num_shards, load_tiny, config, ScheduleConfig(max_actors=1, cpus_per_actor=0.5)
        )
        with plan:
            outcomes.append(set(schedule.run(lambda _: None, threading.Event()).done.commits))
    assert outcomes == [{"won"}, {"found"}]
    assert keys_of(tmp_path / "out") == ALL_KEYS


def test_a_shard_that_always_fails_is_named_and_the_others_are_done(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    commits.create_table(str(tmp_path / "out"))
    plan = Plan(
        list_images([str(archive)]), Results(str(tmp_path / "out"), []), weights_sha256="1", settings_hash="2",
        config=ShardConfig(images_per_shard=12),
    )  # fmt: skip
    first, second = plan.shards()
    blocked = tmp_path / "out" / "_commits" / f"{first.shard_id}.json"
    blocked.mkdir(parents=True)  # a commit that can neither be read nor written
    config = ActorConfig(output=str(tmp_path / "out"), run_id="r", score_threshold=0.0, metadata=METADATA)
    schedule = Schedule(iter([first, second]), 2, load_tiny, config, ScheduleConfig(max_actors=1, cpus_per_actor=0.5))
    with plan:
        result = schedule.run(lambda _: None, threading.Event())
    assert list(result.given_up) == [first.shard_id]
    assert (result.done.shards, result.done.last_shard) == (1, second.shard_id)


def test_actor_bounds_are_checked() -> None:
    with pytest.raises(ConfigError, match="got 3:2"):
        ScheduleConfig(min_actors=3, max_actors=2)

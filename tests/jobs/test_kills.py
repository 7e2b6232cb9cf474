"""Nothing lost, nothing doubled: drivers, actors and raylets are killed with -9 at random times, the run repeated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import model
from model.structures import ImageSize
from pipeline.results import open_results
from pipeline.scenes import draw_scene
from tests.reference import processes

pytestmark = pytest.mark.slow

NUM_IMAGES = 1_000
NUM_KILLS = 20
RUN_LIMIT_SECONDS = 180


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    scenes = [draw_scene(seed, ImageSize(72, 96)).image for seed in range(50)]
    for index in range(NUM_IMAGES):
        shifted = np.roll(scenes[index % 50], index, axis=1)  # all differ
        Image.fromarray(shifted).save(folder / f"{index:04d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model.save(model.random_network(model.R18_FPN(num_classes=6, min_size=96, max_size=160), seed=0), path)
    return path


def start(archive: Path, output: Path, weights: Path) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "jobs", "segment", str(archive), "--output", str(output), "--weights", str(weights)),
        *("--images-per-shard", "10", "--actors", "2", "--cpus-per-actor", "1", "--score-threshold", "0.98", "--json"),
    ]
    with (output.parent / f"{output.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def num_commits(output: Path) -> int:
    return len(list((output / "_commits").glob("*.json"))) if (output / "_commits").exists() else 0


def instances_of(output: Path) -> pa.Table:
    """Everything a user sees of the instances, in an order that does not depend on which run made them."""
    table = open_results(str(output)).instances().to_table().drop_columns(["run"])
    return table.sort_by([("image_key", "ascending"), ("instance_index", "ascending")])


def assert_whole(output: Path) -> None:
    results = open_results(str(output))
    keys = results.images().to_table(columns=["image_key"])["image_key"].to_pylist()
    assert len(keys) == len(set(keys)) == NUM_IMAGES
    assert sum(results.images().to_table(columns=["num_instances"])["num_instances"].to_pylist()) == len(
        instances_of(output)
    )


def victims(driver: int, kind: str) -> list[int]:
    if kind == "driver":
        return [driver]
    return processes.named({"actor": "ray::SegmentActor", "raylet": "raylet/raylet"}[kind], below=driver)


def finish(run: subprocess.Popen[bytes], family: set[int]) -> None:
    """Wait for a driver to end, then end what a killed one left behind."""
    run.wait(RUN_LIMIT_SECONDS)
    time.sleep(1)
    for pid in family:
        if "ray" in processes.command(pid):
            os.kill(pid, signal.SIGKILL)


def test_twenty_kills_lose_and_double_nothing(archive: Path, weights: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert start(archive, undisturbed, weights).wait(RUN_LIMIT_SECONDS) == 0
    assert_whole(undisturbed)
    expected = instances_of(undisturbed)
    assert expected.num_rows > 0

    chance = random.Random(0)
    kills: list[str] = []
    table = 0
    while len(kills) < NUM_KILLS:
        output = tmp_path / f"table-{table}"
        run, family = start(archive, output, weights), set[int]()
        while run.poll() is None and len(kills) < NUM_KILLS:
            before, waited = num_commits(output), time.monotonic()
            pause = chance.uniform(0.5, 4.0)
            while run.poll() is None and (num_commits(output) == before or time.monotonic() - waited < pause):
                family |= set(processes.descendants(run.pid))
                time.sleep(0.05)
                assert time.monotonic() - waited < RUN_LIMIT_SECONDS, "the run stands still"
            kind = ("driver", "actor", "actor", "raylet")[len(kills) % 4]
            found = victims(run.pid, kind)
            if run.poll() is None and found:
                os.kill(chance.choice(found), signal.SIGKILL)
                kills.append(kind)
                if kind != "actor":
                    break
        finish(run, family)
        if run.returncode == 0:
            assert_whole(output)
            assert instances_of(output).equals(expected)
            table += 1
    output = tmp_path / f"table-{table}"
    last = start(archive, output, weights)
    assert last.wait(RUN_LIMIT_SECONDS) == 0, (tmp_path / f"{output.name}.log").read_text()[-3000:]
    assert_whole(output)
    assert instances_of(output).equals(expected)
    summary = json.loads((tmp_path / f"{output.name}.log").read_text().splitlines()[-1])
    print(f"kills: {kills}; tables finished under them: {table}; the last run did {summary['images_planned']} images")  # noqa: T201

"""maskline train as a user runs it: the command on a real local Ray, its workers and its driver killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import model
from model import R18_FPN, Recipe
from model.initial_weights import initialise
from model.network import build_network
from model.structures import ImageSize
from model.weights import to_bytes
from pipeline import checkpoints
from pipeline.coco import read_coco
from pipeline.scenes import CATEGORIES, write_archive
from pipeline.training_log import History
from tests.reference import processes

LIMIT_SECONDS = 240
CHECKPOINT_EVERY = 4

SMALL = replace(
    R18_FPN(num_classes=1 + len(CATEGORIES), min_size=96, max_size=160),
    body_width=32,
    norm="group",  # no statistics of a batch, which several workers would not share
    fpn_channels=32,
    anchor_sizes=(8, 16, 32, 64, 128),
    box_head_width=64,
    mask_channels=32,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.json`` with 16 drawn images, ``val.json`` with 4, and a small network's weights."""
    folder = tmp_path_factory.mktemp("dataset")
    document = json.loads(write_archive(folder, num_images=30, seed=3).read_text())
    loose = [image for image in document["images"] if "#" not in image["file_name"]]
    for name, images in (("train", loose[:16]), ("val", loose[16:20])):
        ids = {image["id"] for image in images}
        annotations = [one for one in document["annotations"] if one["image_id"] in ids]
        (folder / f"{name}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": document["categories"]})
        )
    network = build_network(SMALL, Recipe())
    initialise(network, seed=0)
    categories = dict(enumerate(CATEGORIES, 1))
    (folder / "start.safetensors").write_bytes(to_bytes(network, SMALL, Recipe(), categories))
    return folder


def command(folder: Path, output: Path, *options: object) -> list[str]:
    arguments: list[object] = ["train", "--train-annotations", folder / "train.json", "--train-images", folder]
    arguments += ["--output", output, "--init", folder / "start.safetensors", "--batch-size", 4, "--log-every", 1]
    arguments += ["--cpus-per-worker", 1, "--loader-processes", 0]
    arguments += ["--checkpoint-every", CHECKPOINT_EVERY, "--optimiser.warmup-steps", 10]
    arguments += ["--losses.rpn-pre-nms", 100, "--losses.rpn-post-nms", 50, "--losses.box-samples", 32]
    arguments += ["--augment.min-sizes", 80, 96, "--augment.brightness", 0.2, *options]
    return [sys.executable, "-m", "jobs", *map(str, arguments)]


IN_DOUBLE = ("--precision", "fp64")
"""In float32 the last bit, which two workers sum otherwise than one, grows with the steps and in ten of them comes to
turn which proposals are trained on."""


def start(folder: Path, output: Path, *options: object) -> subprocess.Popen[bytes]:
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command(folder, output, *options), stdout=log, stderr=log)


def said(output: Path) -> str:
    return output.with_suffix(".log").read_text()


def finish(folder: Path, output: Path, *options: object) -> History:
    """Run to the end; its records."""
    run = start(folder, output, *options)
    assert run.wait(LIMIT_SECONDS) == 0, said(output)[-3000:]
    return records(output)


def records(output: Path) -> History:
    return History.from_json_lines((output / "metrics.jsonl").read_bytes())


def assert_same_curve(found: History, expected: History) -> None:
    """Every step once, with the same losses; those of other images would be far off."""
    assert [record.step for record in found.steps] == list(range(len(expected.steps)))
    for one, other in zip(found.steps, expected.steps, strict=True):
        for name, loss in other.losses.items():
            assert one.losses[name] == pytest.approx(loss, rel=1e-4, abs=1e-6), (one.step, name)
    different = [
        a.loss != pytest.approx(b.loss, rel=1e-3) for a, b in zip(expected.steps, expected.steps[1:], strict=False)
    ]
    assert all(different)


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[bytes], output: Path) -> None:
    began = time.monotonic()
    while not condition():
        assert run.poll() is None, said(output)[-3000:]
        assert time.monotonic() - began < LIMIT_SECONDS, said(output)[-3000:]
        time.sleep(0.05)


DEFECTS = {
    "zero_area",
    "outside_image",
    "unknown_category",
    "unknown_image",
    "bad_segmentation",
    "duplicate_annotation_id",
    "duplicate_image_id",
}


@pytest.fixture(scope="module")
def with_defects(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.json`` with one more entry for each of DEFECTS, and an image whose file is not there."""
    document = json.loads((folder / "train.json").read_text())
    first, second = document["images"][:2]
    one = document["annotations"][0]
    added: list[dict[str, Any]] = [
        {**one, "id": 90_001, "bbox": [5, 5, 0, 9]},
        {**one, "id": 90_002, "bbox": [9_000, 5, 20, 20]},
        {**one, "id": 90_003, "category_id": 77},
        {**one, "id": 90_004, "image_id": 90_000},
        {**one, "id": 90_005, "segmentation": [[1, 2, 3]]},
        {**one},
    ]
    missing = {**first, "id": 80_001, "file_name": "loose/00/gone.jpg"}
    twice = {**second, "file_name": "loose/00/other.jpg"}
    document["annotations"] += [*added, {**one, "id": 90_006, "image_id": 80_001}]
    document["images"] += [missing, twice]
    annotations = tmp_path_factory.mktemp("defects") / "defects.json"
    annotations.write_text(json.dumps(document))
    assert read_coco(str(annotations)).defects.counts == dict.fromkeys(DEFECTS, 1)
    return annotations


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> History:
    """12 steps, 3 epochs, of two workers."""
    return finish(folder, tmp_path_factory.mktemp("undisturbed") / "out", "--epochs", 3, "--workers", 2, *IN_DOUBLE)


def test_a_run_names_defects_and_leaves_what_it_promises(folder: Path, with_defects: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = ("--train-annotations", with_defects, "--val-annotations", folder / "val.json", "--val-images", folder)
    history = finish(folder, output, "--epochs", 1.5, *data, "--evaluate-every", 0.5, "--optimiser.ema", 0.9, "--json")
    for kind in (*DEFECTS, "missing_file"):
        assert kind in said(output)
    assert "train on 16 images" in said(output)
    assert [record.step for record in history.steps] == list(range(6))
    assert [record.step for record in history.evaluations] == [1, 3, 5]
    assert set(history.evaluations[-1].scores) >= {"bbox AP", "segm AP", "segm AP50"}
    assert [record.epoch for record in history.steps] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    for name in ("curves.png", "predictions.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 200
    assert len(list((output / "tensorboard").iterdir())) == 1
    assert "step 6/6" in said(output)
    assert "ETA" in said(output)
    result = json.loads(said(output).splitlines()[-1])
    assert result["scores"] == history.evaluations[-1].scores
    net = model.load(output / "weights.safetensors")
    assert net.categories == dict(enumerate(CATEGORIES, 1))
    image = np.zeros((*ImageSize(120, 90), 3), dtype=np.uint8)
    assert net.predict([image])[0].size == (120, 90)

    again = subprocess.run(command(folder, output, "--epochs", 3), capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "has come to step 6; go on with --resume" in again.stderr
    other = subprocess.run(
        command(folder, output, "--epochs", 1.5, "--seed", 1, "--resume"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode == 2, other.stderr
    assert "a run with other seed, optimiser;" in other.stderr


def test_one_worker_computes_what_two_do(folder: Path, undisturbed: History, tmp_path: Path) -> None:
    assert_same_curve(finish(folder, tmp_path / "out", "--epochs", 3, "--workers", 1, *IN_DOUBLE), undisturbed)


@pytest.mark.slow
def test_one_worker_computes_what_two_do_for_fifty_steps(folder: Path, tmp_path: Path) -> None:
    two = finish(folder, tmp_path / "two", "--epochs", 12.5, "--workers", 2, *IN_DOUBLE)
    assert len(two.steps) == 50
    assert_same_curve(finish(folder, tmp_path / "one", "--epochs", 12.5, "--workers", 1, *IN_DOUBLE), two)


@pytest.mark.slow  # a killed driver leaves its workers dead too
def test_a_killed_worker_leaves_the_curve_as_it_was(folder: Path, undisturbed: History, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = start(folder, output, "--epochs", 3, "--workers", 2, *IN_DOUBLE)
    wait_for(lambda: f"step {CHECKPOINT_EVERY + 2}/12" in said(output), run, output)
    workers = processes.named("RayTrainWorker", below=run.pid)
    os.kill(workers[-1], signal.SIGKILL)
    assert run.wait(LIMIT_SECONDS) == 0, said(output)[-3000:]
    assert f"going on from the checkpoint of step {CHECKPOINT_EVERY}" in said(output)
    assert_same_curve(records(output), undisturbed)


def test_a_killed_driver_leaves_the_curve_as_it_was(folder: Path, undisturbed: History, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = start(folder, output, "--epochs", 3, "--workers", 2, *IN_DOUBLE)
    wait_for(lambda: f"step {CHECKPOINT_EVERY + 2}/12" in said(output), run, output)
    family = processes.descendants(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    for pid in family:
        if "ray" in processes.command(pid):
            os.kill(pid, signal.SIGKILL)
    assert_same_curve(finish(folder, output, "--epochs", 3, "--workers", 2, *IN_DOUBLE, "--resume"), undisturbed)
    assert "going on from the checkpoint" in said(output)


@pytest.mark.slow
def test_sigterm_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = start(folder, output, "--epochs", 50)
    wait_for(lambda: f"step {CHECKPOINT_EVERY + 1}/" in said(output), run, output)
    run.send_signal(signal.SIGTERM)
    assert run.wait(LIMIT_SECONDS) == 1
    assert said(output).splitlines()[-1].endswith("stays: go on with --resume")


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    output, weights = tmp_path / "out", tmp_path / "start.safetensors"
    config = replace(SMALL, norm="batch")
    network = build_network(config, Recipe())
    initialise(network, seed=0)
    weights.write_bytes(to_bytes(network, config, Recipe(), dict(enumerate(CATEGORIES, 1))))
    options = ("--init", weights, "--optimiser.learning-rate", 1e30, "--optimiser.clip-norm", 0)
    run = start(folder, output, "--epochs", 3, *options)
    assert run.wait(LIMIT_SECONDS) == 1
    assert "not finite" in said(output)
    assert "loose/00/scene_" in said(output)
    assert "rpn_objectness" in said(output)
    kept = checkpoints.newest(str(output))
    assert kept is not None
    assert f"step {kept['step'] + 1}: the losses" in said(output)
    assert f"The state of step {kept['step']} is kept" in said(output)
    assert all(value.isfinite().all() for value in kept["network"].values())
    # those of the weights that this step began with, times the rate, would be 1e25 and more
    assert kept["network"]["body.stem.norm.running_mean"].abs().max() < 100
    assert len(records(output).steps) == kept["step"]


def test_a_run_that_can_read_nothing_stops(folder: Path, tmp_path: Path) -> None:
    for image in json.loads((folder / "train.json").read_text())["images"]:
        path = tmp_path / "cut" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / image["file_name"]).read_bytes()[:50])
    output = tmp_path / "out"
    run = start(folder, output, "--epochs", 3, "--train-images", tmp_path / "cut")
    assert run.wait(LIMIT_SECONDS) == 1
    assert "step 10: no image of the last 10 steps could be read" in said(output)
    kept = checkpoints.newest(str(output))
    assert kept is not None
    assert kept["step"] == 10
    assert len(records(output).steps) == 10


def test_nothing_usable_is_refused(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "train.json").read_text())
    for one in document["annotations"]:
        one["bbox"] = [0, 0, 0, 0]
    annotations = tmp_path / "unusable.json"
    annotations.write_text(json.dumps(document))
    run = subprocess.run(
        command(folder, tmp_path / "out", "--train-annotations", annotations),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "unusable.json" in run.stderr
    assert "zero_area" in run.stderr
    assert not (tmp_path / "out").exists()

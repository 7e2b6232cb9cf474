"""maskline benchmark: ratios against named peers, on the same files, in the same run.

- ``pipeline_vs_ray_data``: everything but the model (a no-op stands in for it on both sides) against Ray Data's
  ``read_images → map_batches → write_parquet``.
- ``pipeline_vs_best_ray_data``: the same against the fastest Ray Data pipeline we could write: ``read_binary_files``,
  torchvision's decoder in ``map_batches``.
- ``end_to_end_vs_model_loop``: fetch … commit with a real network against a bare loop over images decoded beforehand.
- ``model_vs_torchvision``: pixels in memory to run lengths, of the same images with the same weights, against
  torchvision's network in float32; its other forms and ours are rows beside it.
- ``train_vs_bare_step``: the loop of ``maskline train`` against its forward, backward and step alone, over batches in
  memory; ``train_vs_torchvision``: against torchvision's network of the same shape with its losses, in our loop.

The start of Ray and of the model is left out on all sides; listing and planning are counted on all.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import ray
import torch
import torchvision
import tyro
from rich.console import Console
from rich.table import Table

import model
from jobs import bare_loop_peer, bare_training_peer, ray_data_peer, torchvision_training_peer
from jobs.command import run
from jobs.model_benchmark import (
    ModelBenchmark,
    ModelRow,
    TorchvisionForm,
    measure_model,
    model_ratios,
    model_table,
)
from jobs.segment import SegmentConfig, segment
from jobs.starting_network import ModelName
from jobs.train import train
from jobs.train_config import TrainConfig
from jobs.trainee import MakeTrainee, our_trainee
from model.structures import Detections, ImageSize
from pipeline import cluster
from pipeline.errors import ConfigError
from pipeline.model_thread import Pixels
from pipeline.scenes import draw_scene, write_archive
from pipeline.training_log import History
from pipeline.workers import ACTOR_ENVIRONMENT

Part = Literal["model", "pipeline", "end_to_end", "train"]

PIPELINE_SHARD, MODEL_SHARD = 500, 10
"""Images in a shard, so that each run has several."""

TRAINED_IMAGES, TRAINED_BATCH = 64, 8
"""Drawn scenes trained on, and images in a step."""

DRAWN_IMAGES = 100
"""Distinct images drawn when no folder is given."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure maskline against named peers in one run."""

    parts: tuple[Part, ...] = ("model", "pipeline", "end_to_end", "train")
    """What to measure."""
    images: str | None = None
    """A folder of JPEGs; without it, scenes of 640×480 are drawn."""
    num_images: int = 5_000
    """For the pipeline part: the folder's images are copied under new names until there are so many."""
    num_model_images: int = 12
    """For the parts with a model: end to end, and the model itself."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """For the model part; by default 16 on cuda and 1 on a CPU."""
    min_size: int = 800
    """For the model part: the short side of its input, pixels."""
    model_peers: tuple[TorchvisionForm, ...] = ("eager", "bf16")
    """For the model part: the forms of torchvision's network; compiling it takes minutes."""
    train_steps: int = 24
    """For the train part, the first three of which do not count."""
    train_model: ModelName = "R18-half-FPN"
    """For the train part."""
    weights: str | None = None
    """For the end to end part; without it, a random R50-FPN that finds something in every image."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """For the parts with a model."""
    repeats: int = 3
    """Of each measurement; the median counts."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured."""

    part: str
    system: str
    images: int
    seconds: tuple[float, ...]
    """Of each repeat."""

    @property
    def images_per_second(self) -> float:
        return self.images / statistics.median(self.seconds)


class NoOpSegmenter:
    """Stands where the model would: takes decoded images, finds nothing."""

    batch_size = 16

    def padded_size(self, size: ImageSize) -> ImageSize:
        """Images of all sizes go together, as they do in the peers' batches."""
        return ImageSize(1, 1)

    def detect(self, images: Sequence[Pixels], score_threshold: float) -> Sequence[Pixels]:
        return images

    def encode(self, raw: Sequence[Pixels], score_threshold: float) -> list[Detections]:
        return [_no_detections(ImageSize(*image.shape[:2])) for image in raw]


def _no_detections(size: ImageSize) -> Detections:
    return Detections(
        size=size,
        boxes=np.zeros((0, 4), np.float32),
        scores=np.zeros(0, np.float32),
        category_ids=np.zeros(0, np.int64),
        categories=[],
        masks=[],
        areas=np.zeros(0, np.int64),
    )


def measure_pipeline(folder: Path, work: Path, weights: Path, repeats: int) -> list[Row]:
    """The no-op pipeline of ours, and of Ray Data in two forms, turn about."""
    count = sum(1 for _ in folder.iterdir())
    systems: dict[str, Callable[[Path], float]] = {
        "maskline": functools.partial(_run_maskline, str(folder), str(weights), NoOpSegmenter, "cpu", PIPELINE_SHARD),
        "ray data, read_images": functools.partial(ray_data_peer.run, str(folder), best=False),
        "ray data, read_binary_files": functools.partial(ray_data_peer.run, str(folder), best=True),
    }
    outputs = (work / f"pipeline-{number}" for number in itertools.count())
    seconds = _take_turns(systems, outputs, repeats)
    return [Row(part="pipeline", system=system, images=count, seconds=times) for system, times in seconds.items()]


def measure_end_to_end(config: BenchmarkConfig, folder: Path, work: Path, weights: Path) -> list[Row]:
    """The whole of ours with a real network, and a bare loop of the same network over pixels in memory."""
    device = cluster.choose_device(config.device, None)
    precision: Literal["fp32", "bf16"] = "bf16" if device == "cuda" else "fp32"
    load = functools.partial(
        bare_loop_peer.load_warm, weights.read_bytes(), str(next(folder.iterdir())), device, precision
    )
    cpus = os.cpu_count() or 1
    loop = ray.remote(bare_loop_peer.ModelLoop).options(
        num_cpus=0, num_gpus=0 if device == "cpu" else 1, runtime_env={"env_vars": ACTOR_ENVIRONMENT}
    )
    paths = sorted(folder.iterdir())

    def run_loop(_: Path) -> float:
        actor = loop.remote(weights.read_bytes(), device, precision, cpus, [str(path) for path in paths])
        seconds: float = ray.get(actor.run.remote())
        ray.kill(actor)
        return seconds

    systems: dict[str, Callable[[Path], float]] = {
        "maskline": functools.partial(_run_maskline, str(folder), str(weights), load, device, MODEL_SHARD),
        "bare model loop": run_loop,
    }
    outputs = (work / f"end-to-end-{number}" for number in itertools.count())
    seconds = _take_turns(systems, outputs, config.repeats)
    return [
        Row(part="end to end", system=system, images=len(paths), seconds=times) for system, times in seconds.items()
    ]


def measure_training(config: BenchmarkConfig, work: Path) -> list[Row]:
    """Our loop, its computation alone, and torchvision's network in our loop, turn about."""
    annotations = write_archive(work / "scenes", num_images=TRAINED_IMAGES, num_in_tar=0, seed=0)
    steps, warm = config.train_steps, bare_training_peer.WARM_STEPS
    training = TrainConfig(
        train_annotations=str(annotations),
        train_images=str(annotations.parent),
        output="",
        model=config.train_model,
        batch_size=TRAINED_BATCH,
        epochs=steps * TRAINED_BATCH / TRAINED_IMAGES,
        device=config.device,
        log_every=steps,
    )

    def run_loop(make_trainee: MakeTrainee, output: Path) -> float:
        train(replace(training, output=str(output)), make_trainee)
        history = History.from_json_lines((output / "metrics.jsonl").read_bytes())
        return sum(record.seconds for record in history.steps[warm:])

    def run_bare(output: Path) -> float:
        seconds: float = train(replace(training, output=str(output)), training=bare_training_peer.BareTraining)[
            "seconds"
        ]
        return seconds

    systems: dict[str, Callable[[Path], float]] = {
        "maskline": functools.partial(run_loop, our_trainee),
        "bare step": run_bare,
        "torchvision": functools.partial(run_loop, torchvision_training_peer.torchvision_trainee),
    }
    seconds = _take_turns(systems, (work / f"train-{number}" for number in itertools.count()), config.repeats)
    images = (steps - warm) * TRAINED_BATCH
    return [Row(part="train", system=system, images=images, seconds=times) for system, times in seconds.items()]


def _take_turns(
    systems: dict[str, Callable[[Path], float]], outputs: Iterator[Path], repeats: int
) -> dict[str, tuple[float, ...]]:
    """Each system in turn, so that a slow minute of the machine meets them all."""
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(repeats):
        for system, measure in systems.items():
            seconds[system].append(measure(next(outputs)))
    return {system: tuple(times) for system, times in seconds.items()}


def _run_maskline(
    folder: str,
    weights: str,
    load_segmenter: Callable[[], Any],
    device: cluster.Device,
    images_per_shard: int,
    output: Path,
) -> float:
    config = SegmentConfig(
        inputs=(folder,), output=str(output), weights=weights, device=device, images_per_shard=images_per_shard
    )
    summary = segment(config, load_segmenter)
    summary.raise_if_incomplete()
    assert summary.images_failed == 0, summary.failed_by_reason
    print(f"{summary.instances / summary.images_ok:.1f} instances per image", file=sys.stderr)
    return summary.plan_seconds + summary.run_seconds


def copy_images(source: str | None, folder: Path, count: int) -> Path:
    """A folder of ``count`` JPEGs: those of ``source``, or drawn ones, copied under new names as often as needed."""
    folder.mkdir(parents=True)
    originals = _draw_images(folder.parent / "drawn") if source is None else sorted(Path(source).glob("*.jp*g"))
    if not originals:
        raise ConfigError(f"{source} holds no .jpg; give --images another folder, or leave it out to have scenes drawn")
    for number, path in zip(range(count), itertools.cycle(originals)):
        (folder / f"{number:06d}.jpg").write_bytes(path.read_bytes())
    return folder


def _draw_images(folder: Path) -> list[Path]:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    paths = [folder / f"{seed}.jpg" for seed in range(DRAWN_IMAGES)]
    for seed, path in enumerate(paths):
        if not path.exists():
            Image.fromarray(draw_scene(seed, ImageSize(480, 640)).image).save(path, quality=92)
    return paths


def _ratios(rows: list[Row]) -> dict[str, float]:
    rates = {(row.part, row.system): row.images_per_second for row in rows}
    pairs = {
        "pipeline_vs_ray_data": ("pipeline", "ray data, read_images"),
        "pipeline_vs_best_ray_data": ("pipeline", "ray data, read_binary_files"),
        "end_to_end_vs_model_loop": ("end to end", "bare model loop"),
        "train_vs_bare_step": ("train", "bare step"),
        "train_vs_torchvision": ("train", "torchvision"),
    }
    return {
        name: rates[part, "maskline"] / rates[part, peer]
        for name, (part, peer) in pairs.items()
        if (part, peer) in rates
    }


def main(config: BenchmarkConfig) -> None:
    """The command: measure, and print rates and ratios."""
    if set(config.parts) - {"model"}:
        cluster.connect(None)
    rows: list[Row] = []
    model_rows: list[ModelRow] = []
    with tempfile.TemporaryDirectory(prefix="maskline-benchmark-") as name:
        work = Path(name)
        if "model" in config.parts:
            model_rows = measure_model(_model_setting(config, work), bare_loop_peer.read_pixels)
        if "train" in config.parts:
            rows += measure_training(config, work)
        if "pipeline" in config.parts:
            folder = copy_images(config.images, work / "many", config.num_images)
            (work / "warm").mkdir()
            ray_data_peer.warm_up(folder, work / "warm")
            rows += measure_pipeline(folder, work, _weights(config, work), config.repeats)
        if "end_to_end" in config.parts:
            folder = copy_images(config.images, work / "few", config.num_model_images)
            rows += measure_end_to_end(config, folder, work, _weights(config, work))
    _print(rows, model_rows, config)


def _model_setting(config: BenchmarkConfig, work: Path) -> ModelBenchmark:
    device = cluster.choose_device(config.device, None)
    folder = copy_images(config.images, work / "model", config.num_model_images)
    return ModelBenchmark(
        paths=sorted(folder.iterdir()),
        device=torch.device(device),
        batch_size=config.batch_size or (16 if device == "cuda" else 1),
        repeats=config.repeats,
        forms=config.model_peers,
        min_size=config.min_size,
    )


def _weights(config: BenchmarkConfig, work: Path) -> Path:
    """Those asked for, or random ones, made once."""
    path = work / "random-R50-FPN.safetensors" if config.weights is None else Path(config.weights)
    if config.weights is None and not path.exists():
        image = copy_images(config.images, work / "first", 1) / "000000.jpg"
        model.save(model.random_network(model.R50_FPN(), seed=0, image=bare_loop_peer.read_pixels(image)), path)
    return path


def _print(rows: list[Row], model_rows: list[ModelRow], config: BenchmarkConfig) -> None:
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, ray {ray.__version__}"
    table = Table("part", "system", "images", "images/s (median)", "repeats", caption=f"{machine}; {versions}")
    for row in rows:
        repeats = " ".join(f"{row.images / seconds:.1f}" for seconds in row.seconds)
        table.add_row(row.part, row.system, str(row.images), f"{row.images_per_second:.2f}", repeats)
    if rows:
        Console().print(table)
    if model_rows:
        Console().print(model_table(model_rows))
    ratios = _ratios(rows) | model_ratios(model_rows)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    if config.json:
        details = [{**vars(row), "images_per_second": row.images_per_second} for row in rows]
        details += [row.to_json() for row in model_rows]
        print(json.dumps({**ratios, "rows": details, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    run("benchmark", BenchmarkConfig, main)

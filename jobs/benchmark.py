"""maskline benchmark: ratios against named peers, on the same files, in the same run.

- ``pipeline_vs_ray_data``: everything but the model (a no-op stands in for it on both sides) against Ray Data's
  ``read_images → map_batches → write_parquet``.
- ``pipeline_vs_best_ray_data``: the same against the fastest Ray Data pipeline we could write: ``read_binary_files``,
  torchvision's decoder in ``map_batches``.
- ``end_to_end_vs_model_loop``: fetch … commit with a real network against a bare loop over images decoded beforehand.
- ``model_vs_torchvision``: pixels in memory to run lengths, of the same images with the same weights, against
  torchvision's network in float32; its other forms and ours are rows beside it. ``model_vs_untuned_torchvision``:
  the same in a process that nothing of ours is set in, which on a CPU is how its users have it.
- ``model_vs_detectron2``: the same with detectron2's own R50-FPN, where it is installed.
- ``bf16_box_ap_points``, ``bf16_mask_ap_points``, ``bf16_kept``: what bf16 changes in the answers of trained weights.
- ``step_vs_torchvision``: forward, backward and step alone, over batches in memory, against those of torchvision's own
  network and losses in float32 and contiguous memory; ``step_vs_tuned_torchvision``: in our precision, channels-last.
- ``train_vs_bare_step``: the loop of ``maskline train`` against our steps alone; ``train_vs_torchvision``: against
  torchvision's network and losses in our loop.

The start of Ray and of the model is left out on all sides; listing and planning are counted on all.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import ray
import torch
import torchvision
import tyro
from rich.console import Console
from rich.table import Table

from jobs import bare_loop_peer, bare_training_peer, ray_data_peer
from jobs.benchmark_rows import Row
from jobs.command import run
from jobs.model_benchmark import ModelRow, measure_model, measure_untuned
from jobs.model_systems import ModelBenchmark, Peer
from jobs.model_tables import model_ratios, model_table, speed_picture, stage_table
from jobs.pipeline_benchmark import copy_images, measure_end_to_end, measure_pipeline, random_weights
from jobs.precision_benchmark import PrecisionRow, measure_precision, precision_ratios, precision_table
from jobs.starting_network import ModelName
from jobs.training_benchmark import TUNED_TORCHVISION, BodyNorm, TrainingBenchmark, TrainPrecision, measure_training
from pipeline import cluster
from pipeline.errors import ConfigError

Part = Literal["model", "precision", "step", "train", "pipeline", "end_to_end"]

T = TypeVar("T")

LOG_WIDTH = 200
"""Columns of a table that goes to a file."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure maskline against named peers in one run."""

    parts: tuple[Part, ...] = ("model", "step", "train", "pipeline", "end_to_end")
    """What to measure; model, precision and step do without Ray. Precision wants annotations."""
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
    model_peers: tuple[Peer, ...] = ("eager", "bf16")
    """For the model part: the forms of torchvision's network, compiling which takes minutes, and detectron2's where it
    is installed. Untuned: torchvision's also with the memory allocator's own settings."""
    picture: str | None = None
    """For the model part: where a picture of its speeds goes, .png."""
    train_steps: int = 24
    """For the parts that train, the first three of which do not count."""
    train_model: ModelName = "R18-half-FPN"
    """For the parts that train."""
    train_norm: BodyNorm = "keep"
    """For the parts that train: the norm of the body, as of `maskline train`."""
    train_precision: TrainPrecision = "auto"
    """For the parts that train: as of `maskline train`; the plain torchvision of the steps stays in fp32."""
    train_batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """For the parts that train; by default 16 on cuda and 8 on a CPU."""
    train_cpus: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """For the parts that train: CPUs the network computes on; by default all, which it then shares with the rest."""
    weights: str | None = None
    """For the end to end part, where without it there is a random R50-FPN that finds something in every image, and for
    the precision part, where it is the shipped nuclei."""
    annotations: str | None = None
    """For the precision part: a COCO file."""
    annotated_images: str | None = None
    """What its file names are relative to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """For the parts with a model."""
    repeats: int = 3
    """Of each measurement; the median counts."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""

    def __post_init__(self) -> None:
        if self.train_steps <= bare_training_peer.WARM_STEPS:
            raise ConfigError(
                f"train_steps must be above {bare_training_peer.WARM_STEPS}, the first steps, which do not count; "
                f"got {self.train_steps}"
            )
        if "precision" in self.parts and (self.annotations is None or self.annotated_images is None):
            raise ConfigError("part precision needs --annotations and --annotated-images, a COCO file and its images")
        if "detectron2" in self.model_peers and importlib.util.find_spec("detectron2") is None:
            raise ConfigError(
                "detectron2 is not installed; leave it out of --model-peers, or put a checkout of it on PYTHONPATH"
            )


def _ratios(rows: list[Row]) -> dict[str, float]:
    rates = {(row.part, row.system): row.images_per_second for row in rows}
    pairs = {
        "pipeline_vs_ray_data": ("pipeline", "pipeline", "ray data, read_images"),
        "pipeline_vs_best_ray_data": ("pipeline", "pipeline", "ray data, read_binary_files"),
        "end_to_end_vs_model_loop": ("end to end", "end to end", "bare model loop"),
        "step_vs_torchvision": ("step", "step", "torchvision"),
        "step_vs_tuned_torchvision": ("step", "step", TUNED_TORCHVISION),
        "train_vs_bare_step": ("train", "step", "maskline"),
        "train_vs_torchvision": ("train", "train", "torchvision"),
    }
    return {
        name: rates[part, "maskline"] / rates[of_peer, peer]
        for name, (part, of_peer, peer) in pairs.items()
        if (part, "maskline") in rates and (of_peer, peer) in rates
    }


def main(config: BenchmarkConfig) -> None:
    """The command: measure, and print rates and ratios."""
    if set(config.parts) - {"model", "precision", "step"}:
        cluster.connect(None)
    rows: list[Row] = []
    model_rows: list[ModelRow] = []
    precision_rows: list[PrecisionRow] = []
    with tempfile.TemporaryDirectory(prefix="maskline-benchmark-") as name:
        work = Path(name)
        if "model" in config.parts:
            setting = _model_setting(config, work)
            if "untuned" in config.model_peers:
                model_rows += _in_process({}, measure_untuned, setting, bare_loop_peer.read_pixels)
            # Keeps freed memory, as our actors do; the peers gain by it too.
            tuned = _in_process(cluster.WORKER_ENVIRONMENT, measure_model, setting, bare_loop_peer.read_pixels)
            model_rows = tuned + model_rows
        if config.annotations is not None and config.annotated_images is not None and "precision" in config.parts:
            precision_rows = measure_precision(
                config.weights or "nuclei",
                config.annotations,
                config.annotated_images,
                torch.device(cluster.choose_device(config.device, None)),
            )
        if {"step", "train"} & set(config.parts):
            rows += measure_training(_training_setting(config), config.parts, work, config.repeats)
        if "pipeline" in config.parts:
            folder = copy_images(config.images, work / "many", config.num_images)
            (work / "warm").mkdir()
            ray_data_peer.warm_up(folder, work / "warm")
            rows += measure_pipeline(folder, work, _weights(config, work), config.repeats)
        if "end_to_end" in config.parts:
            folder = copy_images(config.images, work / "few", config.num_model_images)
            device = cluster.choose_device(config.device, None)
            rows += measure_end_to_end(folder, work, _weights(config, work), config.repeats, device)
    _print(rows, model_rows, precision_rows, config)


def _in_process(environment: Mapping[str, str], measure: Callable[..., T], *given: object) -> T:
    """In a process of its own that has these variables too."""
    os.environ.update(environment)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *given).result()


def _model_setting(config: BenchmarkConfig, work: Path) -> ModelBenchmark:
    device = cluster.choose_device(config.device, None)
    folder = copy_images(config.images, work / "model", config.num_model_images)
    return ModelBenchmark(
        paths=sorted(folder.iterdir()),
        device=torch.device(device),
        batch_size=config.batch_size or (16 if device == "cuda" else 1),
        repeats=config.repeats,
        peers=config.model_peers,
        min_size=config.min_size,
    )


def _training_setting(config: BenchmarkConfig) -> TrainingBenchmark:
    device = cluster.choose_device(config.device, None)
    return TrainingBenchmark(
        model=config.train_model,
        norm=config.train_norm,
        precision=config.train_precision,
        batch_size=config.train_batch or (16 if device == "cuda" else 8),
        steps=config.train_steps,
        cpus=config.train_cpus,
        device=device,
    )


def _weights(config: BenchmarkConfig, work: Path) -> Path:
    return random_weights(work, config.images) if config.weights is None else Path(config.weights)


def _print(
    rows: list[Row], model_rows: list[ModelRow], precision_rows: list[PrecisionRow], config: BenchmarkConfig
) -> None:
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, ray {ray.__version__}"
    table = Table("part", "system", "images", "images/s (median)", "repeats", caption=f"{machine}; {versions}")
    for row in rows:
        repeats = " ".join(f"{row.images / seconds:.1f}" for seconds in row.seconds)
        table.add_row(row.part, row.system, str(row.images), f"{row.images_per_second:.2f}", repeats)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    if rows:
        console.print(table)
    if model_rows:
        console.print(model_table(model_rows))
        console.print(stage_table(model_rows))
        if config.picture is not None:
            Path(config.picture).write_bytes(speed_picture(model_rows, f"{machine}; {versions}"))
    if precision_rows:
        console.print(precision_table(precision_rows))
    ratios = _ratios(rows) | model_ratios(model_rows) | precision_ratios(precision_rows)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3g}")
    if config.json:
        details = [{**vars(row), "images_per_second": row.images_per_second} for row in rows]
        details += [row.to_json() for row in model_rows] + [row.to_json() for row in precision_rows]
        print(json.dumps({**ratios, "rows": details, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    run("benchmark", BenchmarkConfig, main)

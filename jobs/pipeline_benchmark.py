"""The parts of ``maskline benchmark`` that read, decode and commit: the pipeline without a model, and the whole."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray

import model
from jobs import bare_loop_peer, ray_data_peer
from jobs.benchmark_rows import Row, take_turns
from jobs.segment import segment
from jobs.segment_config import SegmentConfig
from model.structures import Detections, ImageSize
from pipeline import cluster
from pipeline.cluster import WORKER_ENVIRONMENT
from pipeline.errors import ConfigError
from pipeline.scenes import draw_scene
from pipeline.segmenter import Pixels

PIPELINE_SHARD = 500
MODEL_SHARD: dict[cluster.Device, int] = {"cpu": 10, "cuda": 512}
"""Images in a shard: on a CPU so few that each run has several."""


DRAWN_IMAGES = 100
"""Distinct images drawn when no folder is given."""


class NoOpSegmenter:
    """Stands where the model would: takes decoded images, finds nothing."""

    batch_size = 16

    def padded_size(self, size: ImageSize) -> ImageSize:
        """Images of all sizes go together, as they do in the peers' batches."""
        return ImageSize(1, 1)

    def detect(
        self, images: Sequence[Pixels], score_threshold: float, *, sizes: Sequence[ImageSize]
    ) -> Sequence[ImageSize]:
        return sizes

    def encode(self, raw: Sequence[ImageSize], score_threshold: float) -> list[Detections]:
        return [_no_detections(size) for size in raw]


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
    seconds = take_turns(systems, outputs, repeats)
    return [Row(part="pipeline", system=system, images=count, seconds=times) for system, times in seconds.items()]


def measure_end_to_end(folder: Path, work: Path, weights: Path, repeats: int, device: cluster.Device) -> list[Row]:
    """The whole of ours with a real network, and a bare loop of the same network over pixels in memory."""
    precision: Literal["fp32", "bf16"] = "bf16" if device == "cuda" else "fp32"
    load = functools.partial(
        bare_loop_peer.load_warm, weights.read_bytes(), str(next(folder.iterdir())), device, precision
    )
    cpus = os.cpu_count() or 1
    loop = ray.remote(bare_loop_peer.ModelLoop).options(
        num_cpus=0, num_gpus=0 if device == "cpu" else 1, runtime_env={"env_vars": WORKER_ENVIRONMENT}
    )
    paths = sorted(folder.iterdir())

    def run_loop(_: Path) -> float:
        actor = loop.remote(weights.read_bytes(), device, precision, cpus, [str(path) for path in paths])
        seconds: float = ray.get(actor.run.remote())
        ray.kill(actor)
        return seconds

    systems: dict[str, Callable[[Path], float]] = {
        "maskline": functools.partial(_run_maskline, str(folder), str(weights), load, device, MODEL_SHARD[device]),
        "bare model loop": run_loop,
    }
    outputs = (work / f"end-to-end-{number}" for number in itertools.count())
    seconds = take_turns(systems, outputs, repeats)
    return [
        Row(part="end to end", system=system, images=len(paths), seconds=times) for system, times in seconds.items()
    ]


def _run_maskline(
    folder: str,
    weights: str,
    load_segmenter: Callable[[], Any],
    device: cluster.Device,
    images_per_shard: int,
    output: Path,
) -> float:
    config = SegmentConfig(
        report=False,
        inputs=(folder,),
        output=str(output),
        weights=weights,
        device=device,
        images_per_shard=images_per_shard,
    )
    segment(replace(config, dry_run=True))  # a process's first plan imports packages, which belongs to the start
    summary = segment(config, load_segmenter)
    summary.raise_if_incomplete()
    assert summary.images_failed == 0, summary.failed_by_reason
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in summary.stage_seconds.items())
    print(f"{summary.instances / summary.images_ok:.1f} instances per image; waits: {stages}", file=sys.stderr)
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


def random_weights(work: Path, images: str | None) -> Path:
    """Those of an R50-FPN that finds something in every image, made once."""
    path = work / "random-R50-FPN.safetensors"
    if not path.exists():
        image = copy_images(images, work / "first", 1) / "000000.jpg"
        model.save(model.random_network(model.R50_FPN(), seed=0, image=bare_loop_peer.read_pixels(image)), path)
    return path

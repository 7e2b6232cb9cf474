"""The training parts of ``maskline benchmark``: our steps and our loop, and torchvision's network and losses there."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch

from jobs import bare_training_peer, torchvision_training_peer
from jobs.benchmark_rows import Row, take_turns
from jobs.starting_network import ModelName
from jobs.train import train
from jobs.train_config import TrainConfig
from jobs.trainee import MakeTrainee, our_trainee
from model.optimiser import OptimiserConfig
from pipeline import cluster
from pipeline.scenes import write_archive
from pipeline.training_log import History

BodyNorm = Literal["keep", "frozen", "batch", "group"]
"""As of `maskline train`."""
TrainPrecision = Literal["auto", "fp32", "bf16"]
"""As of `maskline train`."""

TRAINED_IMAGES = 64
"""Drawn scenes trained on."""
TUNED_TORCHVISION = "torchvision, our precision, channels-last"
"""The peer's network as we would run it."""


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """What is trained."""

    model: ModelName
    norm: BodyNorm
    precision: TrainPrecision
    batch_size: int
    steps: int
    """The first three of which do not count."""
    cpus: int | None
    """The network computes on; all, if None."""
    device: cluster.Device


def measure_training(setting: TrainingBenchmark, parts: Sequence[str], work: Path, repeats: int) -> list[Row]:
    """Our loop and torchvision's network in it (`train`), and the computation of both alone (`step`), turn about."""
    annotations = write_archive(work / "scenes", num_images=TRAINED_IMAGES, num_in_tar=0, seed=0)
    steps, warm = setting.steps, bare_training_peer.WARM_STEPS
    training = TrainConfig(
        train_annotations=str(annotations),
        train_images=str(annotations.parent),
        output="",
        model=setting.model,
        norm=setting.norm,
        precision=setting.precision,
        cpus_per_worker=setting.cpus,
        batch_size=setting.batch_size,
        epochs=steps * setting.batch_size / TRAINED_IMAGES,
        device=setting.device,
        log_every=steps,
        optimiser=OptimiserConfig(learning_rate=1e-6),  # next to nothing is learnt: each step has the same work
    )

    def run_loop(make_trainee: MakeTrainee, output: Path) -> float:
        train(replace(training, output=str(output)), make_trainee)
        history = History.from_json_lines((output / "metrics.jsonl").read_bytes())
        return sum(record.seconds for record in history.steps[warm:])

    def run_bare(make_trainee: MakeTrainee, output: Path, *, as_reference: bool = False) -> float:
        bare = bare_training_peer.bare_seconds
        measure = _as_worker(bare, setting.device) if "train" in parts else bare
        settings = replace(training, output=str(output), precision="fp32" if as_reference else setting.precision)
        return measure(settings, make_trainee, torch.device(setting.device), channels_last=not as_reference)

    theirs = torchvision_training_peer.torchvision_trainee
    systems: dict[tuple[str, str], Callable[[Path], float]] = {
        ("step", "maskline"): functools.partial(run_bare, our_trainee),
        ("step", "torchvision"): functools.partial(run_bare, theirs, as_reference=True),
        ("step", TUNED_TORCHVISION): functools.partial(run_bare, theirs),
        ("train", "maskline"): functools.partial(run_loop, our_trainee),
        ("train", "torchvision"): functools.partial(run_loop, theirs),
    }
    asked = {key: run for key, run in systems.items() if key[0] in parts}
    seconds = take_turns(asked, (work / f"train-{number}" for number in itertools.count()), repeats)
    images = (steps - warm) * setting.batch_size
    return [Row(part=part, system=system, images=images, seconds=times) for (part, system), times in seconds.items()]


def _as_worker(measure: Callable[..., float], device: cluster.Device) -> Callable[..., float]:
    """In a process such as the loop's workers are, beside the same others of Ray's."""
    environment = {"env_vars": cluster.WORKER_ENVIRONMENT}
    options = {"num_cpus": os.cpu_count(), "num_gpus": int(device == "cuda"), "max_calls": 1}
    remote: Any = ray.remote(**options, runtime_env=environment)(measure)

    def measure_there(*given: object, **named: object) -> float:
        seconds: float = ray.get(remote.remote(*given, **named))
        return seconds

    return measure_there

"""What a worker of ``maskline train`` is given, and how it sets itself up: threads, precision, images."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from jobs.train_config import TrainConfig
from jobs.trainee import MakeTrainee
from model import MaskRCNN, packed_batch
from pipeline.coco import CocoDataset
from pipeline.training_data import Loading


@dataclass(frozen=True, kw_only=True)
class Task:
    """What each worker is given."""

    config: TrainConfig
    weights: bytes
    """The starting network, a weight file of ours."""
    train: CocoDataset
    val: CocoDataset | None
    num_steps: int
    make_trainee: MakeTrainee


def set_up_torch(config: TrainConfig, device: torch.device, cpus: float) -> None:
    """Threads, seed, precision of products."""
    torch.set_num_threads(max(1, int(cpus)))
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Of the forward pass, by the config's precision."""
    precision: Literal["fp32", "bf16"] = "bf16" if device.type == "cuda" else "fp32"
    if config.precision != "auto":
        precision = config.precision
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def loading_of(task: Task, start: MaskRCNN, device: torch.device) -> Loading:
    """How the images of a run become batches."""
    index_of = {name: index for index, name in start.categories.items()}
    config = task.config
    return Loading(
        folder=config.train_images,
        labels={category_id: index_of[name] for category_id, name in task.train.categories.items()},
        config=start.config,
        recipe=start.recipe,
        augment=config.augment,
        seed=config.seed,
        cache_folder=config.cache_folder or str(Path(tempfile.gettempdir()) / "maskline-images"),
        cache_bytes=int(config.cache_gigabytes * 1e9),
        flip_pairs=task.train.flip_pairs,
        packed=packed_batch.is_for(device, start.recipe),
    )


def loader_processes(config: TrainConfig) -> int:
    """Of a worker, once its threads are set."""
    if config.loader_processes is not None:
        return config.loader_processes
    return min(8, max(1, torch.get_num_threads() - 1))

"""What a worker of ``maskline train`` is given, and how it sets itself up: threads, precision, images."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.train_config import TrainConfig
from jobs.trainee import MakeTrainee
from model import MaskRCNN, packed_batch
from model.ground_truth import TrainingBatch
from pipeline.coco import CocoDataset
from pipeline.coco_evaluation import Kind
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
    is_bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if is_bf16 else contextlib.nullcontext()


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """Of the network that is trained, and of the pixels that enter it."""
    return torch.float64 if config.precision == "fp64" else torch.float32


def laid_out(batch: TrainingBatch, config: TrainConfig) -> TrainingBatch:
    """With the pixels as the network wants them."""
    pixels = batch.pixels.to(weights_dtype(config), memory_format=torch.channels_last)
    return replace(batch, pixels=pixels)


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


def memory_bytes(device: torch.device) -> int:
    """Peak of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def scored_kinds(start: MaskRCNN) -> list[Kind]:
    """What its detections are evaluated as."""
    kinds: list[Kind] = ["bbox"]
    if start.config.mask_head != "none":
        kinds.append("segm")
    if start.config.num_keypoints:
        kinds.append("keypoints")
    return kinds

"""What ``maskline benchmark`` calls a step: forward, backward and step alone, over batches that are in memory.

Network, losses and batches are those of the loop; nothing is read, decoded, recorded or written, and no Ray is needed.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace

import torch

import model
from jobs.train import prepare
from jobs.train_config import TrainConfig
from jobs.trainee import MakeTrainee
from jobs.training_setup import autocast, laid_out, loading_of, set_up_torch, weights_dtype
from model.ground_truth import TrainingBatch
from model.optimiser import build_optimiser, take_step
from model.transfers import HostCopy
from pipeline.loaded import keep_loaded
from pipeline.training_data import TrainingImages
from pipeline.worker_group import WorkerGroup

WARM_STEPS = 3
"""Steps before those that count: the first are the slowest."""


def bare_seconds(
    config: TrainConfig, make_trainee: MakeTrainee, device: torch.device, *, channels_last: bool = True
) -> float:
    """Of the run's steps but the first few, on a thread for each CPU of a worker, by default as many as Ray counts."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    task = prepare(config, make_trainee)
    set_up_torch(config, device, config.cpus_per_worker or os.cpu_count() or 1)
    start = model.load(task.weights)
    trainee = make_trainee(start, config, WorkerGroup(), device)
    network = trainee.network.to(weights_dtype(config)).to(memory_format=memory_format)
    optimiser = build_optimiser(network, config.optimiser)
    kept = _batches(TrainingImages(task.train, loading_of(task, start, device)), task.num_steps, config, device)
    batches = [replace(one, pixels=one.pixels.contiguous(memory_format=memory_format)) for one in kept]
    # A GPU's libraries choose kernels for each batch that they have not seen.
    first = batches if device.type == "cuda" else []
    keep_loaded()  # as the loop does
    began, before = 0.0, None
    for step, batch in enumerate([*first, *itertools.islice(itertools.cycle(batches), task.num_steps)]):
        if step == len(first) + WARM_STEPS:
            _wait(device)
            began = time.monotonic()
        optimiser.zero_grad(set_to_none=True)
        with autocast(config, device):
            losses = trainee.forward(batch)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        if before is not None:
            before.wait()  # where the loop looks at the numbers of the step before
        numbers = take_step(optimiser, [loss.detach() for loss in losses.values()], config.optimiser)
        before = HostCopy(numbers)
    _wait(device)
    return time.monotonic() - began


def _batches(images: TrainingImages, count: int, config: TrainConfig, device: torch.device) -> list[TrainingBatch]:
    """On the device, as the loop makes them; each of the images once at most."""
    parts = images.parts(batch_size=config.batch_size, start=0, rank=0, num_workers=1, accumulate=1)
    num_kept = min(count, max(1, len(images) // config.batch_size))
    return [laid_out(images[part].batch.to(device), config) for part in itertools.islice(parts, num_kept)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

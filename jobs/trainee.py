"""What ``maskline train`` trains: a network with its losses and what detects with it, ours or a peer's in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from jobs.train_config import TrainConfig
from model import MaskRCNN
from model.training import TrainingForward
from model.weights import to_bytes
from pipeline.training_evaluation import Predict
from pipeline.worker_group import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What is trained: our network, or a peer's in its place."""

    network: nn.Module
    """Whose parameters are trained."""
    forward: nn.Module
    """From a TrainingBatch to its losses by name."""
    predictor: Callable[[nn.Module], Predict]
    """What detects with the network as it is at the time."""
    to_bytes: Callable[[nn.Module], bytes]
    """Its weight file."""


MakeTrainee = Callable[[MaskRCNN, TrainConfig, WorkerGroup, torch.device], Trainee]


def our_trainee(start: MaskRCNN, config: TrainConfig, group: WorkerGroup, device: torch.device) -> Trainee:
    """Our network with its losses, those of all workers' images together."""

    def detecting(network: nn.Module) -> Predict:
        net = MaskRCNN(
            network,  # type: ignore[arg-type]  # a copy of the one below
            config=start.config,
            recipe=start.recipe,
            categories=start.categories,
            name="in training",
            sha256="",
            device=device,
            exact=False,
        )
        return net.predict

    network = start.network.to(device)
    return Trainee(
        network=network,
        forward=TrainingForward(
            network, config=start.config, recipe=start.recipe, losses=config.losses, divisor=group.mean_count
        ),
        predictor=detecting,
        to_bytes=lambda network: to_bytes(
            network,  # type: ignore[arg-type]
            start.config,
            start.recipe,
            start.categories,
            half=config.save_half,
        ),
    )

"""Where a run's actors live: a named Ray cluster, or a fresh local one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

import ray

from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]

WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
"""Of each process that computes. glibc gives large blocks back at once and faults each page in again, and in a thread's
own arena it always does: a quarter of R50-FPN's time on a CPU, and an eighth of a training step's, measured."""


@dataclass(frozen=True, kw_only=True)
class ActorShape:
    """What one actor asks of Ray, and how many there is room for now."""

    gpus: float
    cpus: float
    """When there is one for each GPU, or for each node without GPUs."""
    room: int
    """Actors that fit on the nodes of this moment; an autoscaler may make room for more."""

    def cpus_for(self, actors: int) -> float:
        """CPUs for each of so many actors: without GPUs they share the nodes."""
        per_node = -(-actors // max(1, self.room))
        return self.cpus if self.gpus else max(1.0, self.cpus // per_node)


def cluster_address(address: str | None) -> str | None:
    """The cluster that was named, by option or by RAY_ADDRESS; None for a local one."""
    return address or os.environ.get("RAY_ADDRESS") or None


def connect(address: str | None) -> None:
    """Connect to the named cluster, or start a local one that ends with this process.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    if ray.is_initialized():
        return
    named = cluster_address(address)
    try:
        # Without an explicit "local" a stale address file of a killed driver would be followed.
        options: dict[str, Any] = {} if named else {"include_dashboard": False}
        ray.init(address=named or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"no Ray cluster answers at {named or 'local'}: {error}; check --address") from error
    if named and os.environ.get("RAY_AUTH_MODE") != "token":
        logger.warning(
            "the Ray cluster at %s asks for no token, so whoever reaches its ports can run code there; start it, and "
            "this, with RAY_AUTH_MODE=token (see SECURITY.md)",
            named,
        )


def choose_device(device: Literal["auto", "cpu", "cuda"], address: str | None) -> Device:
    """``auto`` is cuda where the cluster (or this machine, for a local run) has a GPU.

    Raises:
        ConfigError: cuda was asked for on a local run and this machine has none.
    """
    if cluster_address(address) is not None:
        if device != "auto":
            return device
        connect(address)
        return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch finds no CUDA device here; use --device auto or cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def actor_shape(device: Device) -> ActorShape:
    """One actor for each GPU with its share of the node's CPUs, or one for each node without GPUs.

    A CPU actor takes its whole node: its model and its decoders use all cores by threads.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if device == "cuda":
        with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
        shares = [node.get("CPU", 1) // node["GPU"] for node in with_gpu]
        return ActorShape(gpus=1, cpus=max(1, min(shares, default=1)), room=int(sum(node["GPU"] for node in with_gpu)))
    sizes = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
    return ActorShape(gpus=0, cpus=min(sizes, default=1), room=len(sizes))

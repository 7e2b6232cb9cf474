"""What the workers of a training run say to each other: torch.distributed behind few words, and alone without it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")

SCORING_HOURS = 6
"""How long workers wait for one that scores an evaluation or writes a checkpoint."""


class WorkerGroup:
    """All workers of a run; collective calls must be made by each of them, in the same order."""

    def __init__(self) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Objects travel between hosts, whatever the gradients travel by.
        self._hosts: Any = (
            dist.new_group(backend="gloo", timeout=timedelta(hours=SCORING_HOURS)) if self.size > 1 else None
        )

    def mean_count(self, count: Tensor) -> Tensor:
        """The mean of all workers' counts, as if there were at least one in all: what losses are divided by."""
        return self._sum(count).clamp(min=1) / self.size

    def mean(self, values: Tensor) -> Tensor:
        return self._sum(values) / self.size

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all workers on the first, in the order of ranks; none on the others."""
        if self.size == 1:
            return items
        lists: list[list[Item]] | None = [[] for _ in range(self.size)] if self.rank == 0 else None
        dist.gather_object(items, lists, group=self._hosts)
        return [item for one in lists or [] for item in one]

    def agrees_on(self, value: object) -> bool:
        """Whether all workers have the same value."""
        if self.size == 1:
            return True
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self._hosts)
        return all(one == values[0] for one in values)

    def take_statistics(self, network: nn.Module) -> None:
        """Give every worker's copy the buffers of the first one's: each has normed other images."""
        for buffer in network.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier(group=self._hosts)

    def _sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(torch.float32).clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

"""The peer of ``maskline benchmark``'s train part: forward, backward and step alone, over batches that are in memory.

The same process, threads, network, losses and batches as the loop has; nothing is read, decoded, recorded or written.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import torch
from torch import nn

from jobs.train_worker import Training, autocast

WARM_STEPS = 3
"""Steps before those that count: the first are the slowest."""


class BareTraining(Training):
    """A run of which only the computation is left."""

    def run(self) -> None:
        """Say how many seconds the steps took after the first few."""
        steps = self.task.num_steps
        batches = [next(self.batches).batch.to(self.device) for _ in range(steps)]
        batches = [
            replace(batch, pixels=batch.pixels.contiguous(memory_format=torch.channels_last)) for batch in batches
        ]
        began = time.monotonic()
        for step, batch in enumerate(itertools.islice(batches, steps)):
            if step == WARM_STEPS:
                began = time.monotonic()
            self.optimiser.zero_grad(set_to_none=True)
            with autocast(self.config, self.device):
                losses = self.forward(batch)
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
            float(nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimiser.clip_norm or math.inf))
            self.optimiser.step()
        if self.group.rank == 0:
            self.events.put(("result", {"seconds": time.monotonic() - began, "steps": steps - WARM_STEPS}))
        self.group.wait()

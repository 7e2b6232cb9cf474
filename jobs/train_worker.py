"""One worker of ``maskline train``: batch → losses → gradients → step → record; at times checkpoint and evaluation.

Nothing random is kept between steps: what is drawn of an image follows from the seed, its epoch and its index, so a run
that goes on from a checkpoint does what it would have done.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from dataclasses import replace
from typing import NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import model
from jobs.training_setup import (
    Task,
    autocast,
    laid_out,
    loader_processes,
    loading_of,
    memory_bytes,
    scored_kinds,
    set_up_torch,
    weights_dtype,
)
from model.norm import running_statistics
from model.optimiser import (
    average,
    build_optimiser,
    drop_frozen_gradients,
    learning_rate_at,
    set_learning_rate,
    take_step,
)
from model.transfers import HostCopy
from pipeline import checkpoints
from pipeline.errors import PipelineError
from pipeline.loaded import keep_loaded
from pipeline.training_data import LoadedBatch, TrainingImages, load_ahead
from pipeline.training_evaluation import Evaluator
from pipeline.training_log import EvaluationRecord, StepRecord
from pipeline.training_output import TrainingOutput
from pipeline.worker_group import WorkerGroup

UNREADABLE_STEPS = 10
"""Steps in a row without a readable image that end a run."""


class _UnderWay(NamedTuple):
    """A step that a device may still be busy with."""

    record: StepRecord
    """Without what `numbers` hold."""
    numbers: HostCopy
    """The losses, the unreadable images (a mean over the workers) and the gradients' norm."""
    file_names: list[str]
    """Of this worker's images."""
    unreadable: list[str]
    """What was wrong with some of them."""


class Training:
    """A run as one of its workers sees it."""

    def __init__(self, task: Task, events: Queue) -> None:
        self.task, self.config, self.events = task, task.config, events
        self.group = WorkerGroup()
        self.device = ray.train.torch.get_device()
        set_up_torch(self.config, self.device, ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        start = model.load(task.weights)
        self.trainee = task.make_trainee(start, self.config, self.group, self.device)
        self.network = self.trainee.network.to(weights_dtype(self.config)).to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.network) if self.config.optimiser.ema else self.network
        self.optimiser = build_optimiser(self.network, self.config.optimiser)
        self.output = TrainingOutput(
            self.config.output,
            num_steps=task.num_steps,
            lines_every=self.config.log_every,
            say=(lambda kind, said: events.put((kind, said))) if self.group.rank == 0 else None,
        )
        self.first_step = self._restore()
        self._under_way: _UnderWay | None = None
        self._statistics = running_statistics(self.network)
        self._kept = [[buffer.clone() for buffer in self._statistics] for _ in range(2)]
        """Before the steps that are even and odd."""
        self._unreadable_steps = 0
        forward = self.trainee.forward
        # Statistics are taken from the first worker where they are used; frozen norms keep what they made of theirs.
        self.forward = DistributedDataParallel(forward, broadcast_buffers=False) if self.group.size > 1 else forward
        self.images = TrainingImages(task.train, loading_of(task, start, self.device))
        self.batches = load_ahead(
            self.images,
            self.images.parts(
                batch_size=self.config.batch_size,
                start=self.first_step,
                rank=self.group.rank,
                num_workers=self.group.size,
                accumulate=self.config.accumulate,
            ),
            loader_processes(self.config),
        )
        self.evaluator = None
        if task.val is not None:
            self.evaluator = Evaluator(
                task.val,
                str(self.config.val_images),
                categories=start.categories,
                kinds=scored_kinds(start),
                group=self.group,
                cache=self.images.cache,
            )

    def run(self) -> None:
        """All steps from the newest checkpoint's on."""
        keep_loaded()
        self._last_step_ended = time.monotonic()
        every = max(1, round(self.config.evaluate_every * len(self.images) / self.config.batch_size))
        for step in range(self.first_step, self.task.num_steps):
            if not self._step(step):
                return
            is_last = step + 1 == self.task.num_steps
            is_due = (
                step + 1
            ) % every == 0 and self.task.num_steps - step > every / 2  # or the last one comes too soon
            is_saved = is_last or (step + 1) % self.config.checkpoint_every == 0
            if (is_due or is_saved) and not self._settle():
                return
            began = time.monotonic()
            if is_last or is_due:
                self._evaluate(step)
            if is_saved:
                self._save(step + 1)
            self._last_step_ended += time.monotonic() - began  # those are no part of the next step
        if self.group.rank == 0:
            self.output.finish(self.trainee.to_bytes(self.averaged))
        self.group.wait()

    def _step(self, step: int) -> bool:
        """Start one step of the optimiser and settle the one before; False if the run ends with that.

        What the device finds it finds while the host is at the next step, or it would stand still in between.
        """
        rate = learning_rate_at(
            step, self.task.num_steps, batch_size=self.config.batch_size, config=self.config.optimiser
        )
        self.optimiser.zero_grad(set_to_none=True)
        means, loaded, waited = self._gradients()
        if not self._settle():
            return False
        set_learning_rate(self.optimiser, rate)
        drop_frozen_gradients(self.network, step, self.config.optimiser)
        numbers = take_step(self.optimiser, list(means.values()), self.config.optimiser)
        if self._statistics:
            torch._foreach_copy_(self._kept[(step + 1) % 2], self._statistics)
        now = time.monotonic()
        record = StepRecord(
            step=step,
            epoch=self._epoch(step),
            losses=dict.fromkeys(list(means)[:-1], math.nan),
            learning_rate=rate,
            grad_norm=math.nan,
            images=self.config.batch_size,
            seconds=now - self._last_step_ended,
            data_seconds=waited,
            memory_bytes=memory_bytes(self.device),
        )
        self._last_step_ended = now
        self._under_way = _UnderWay(
            record,
            HostCopy(numbers),
            [name for batch in loaded for name in batch.file_names],
            [error for batch in loaded for error in batch.unreadable],
        )
        # An average can't be left out by the device.
        return self.averaged is self.network or self._settle()

    def _settle(self) -> bool:
        """Record the step under way; False if its losses or gradients are not finite, or nothing could be read for
        long, which ends the run."""
        if self._under_way is None:
            return True
        (record, numbers, file_names, unreadable), self._under_way = self._under_way, None
        *losses, share, grad_norm = numbers.wait().tolist()
        record = replace(
            record,
            losses=dict(zip(record.losses, losses, strict=True)),
            grad_norm=grad_norm,
            unreadable=round(share * self.group.size),
        )
        if not all(map(math.isfinite, (*losses, grad_norm))):
            parts = ", ".join(f"{name} {loss:.4g}" for name, loss in record.losses.items())
            self._stop(
                f"step {record.step + 1}: the losses or their gradient are not finite ({parts}; norm {grad_norm:.4g})",
                "look at the annotations of its images, or begin again with a lower --optimiser.learning-rate or in "
                "--precision fp32",
                record.step,
                file_names,
            )
            return False
        if self.averaged is not self.network:
            average(self.averaged, self.network, step=record.step, config=self.config.optimiser)
        self.output.add(record)
        self._unreadable_steps = self._unreadable_steps + 1 if record.unreadable == record.images else 0
        if self._unreadable_steps == UNREADABLE_STEPS:
            self._stop(
                f"step {record.step + 1}: no image of the last {UNREADABLE_STEPS} steps could be read",
                f"are they in {self.config.train_images}, as the workers see it?",
                record.step + 1,
                unreadable,
            )
            return False
        return True

    def _gradients(self) -> tuple[dict[str, Tensor], list[LoadedBatch], float]:
        """The mean over all workers of each loss and, last, of their unreadable images; this worker's batches, and the
        seconds it waited for them."""
        sums: dict[str, Tensor] = {}
        loaded, waited = [], 0.0
        for turn in range(self.config.accumulate):
            began = time.monotonic()
            loaded.append(next(self.batches))
            waited += time.monotonic() - began
            is_last = turn + 1 == self.config.accumulate
            with contextlib.nullcontext() if is_last or self.group.size == 1 else self.forward.no_sync():  # type: ignore[operator]
                with autocast(self.config, self.device):
                    losses = self.forward(laid_out(loaded[-1].batch.to(self.device), self.config))
                total = torch.stack(list(losses.values())).sum() / self.config.accumulate
                total.backward()  # type: ignore[no-untyped-call]
            for name, loss in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(loss)) + loss.detach() / self.config.accumulate
        num_unreadable = sum(len(batch.unreadable) for batch in loaded)
        sums["unreadable"] = torch.full((), num_unreadable, dtype=torch.float32, device=self.device)
        means = self.group.mean(torch.stack(list(sums.values())))
        return dict(zip(sums, means, strict=True)), loaded, waited

    def _evaluate(self, step: int) -> None:
        if self.evaluator is None:
            return
        self.group.take_statistics(self.averaged)
        scores = self.evaluator.scores(self.trainee.predictor(self.averaged))
        if self.group.rank == 0:
            record = EvaluationRecord(step=step, epoch=self._epoch(step), scores=scores)
            self.output.evaluated(
                record, picture=self.evaluator.picture, weights=lambda: self.trainee.to_bytes(self.averaged)
            )
        ray.train.report({"step": step, **scores})

    def _save(self, step: int) -> None:
        """What a run needs to go on at `step`."""
        if self.group.rank == 0:
            state = {
                "network": self.network.state_dict(),
                "averaged": None if self.averaged is self.network else self.averaged.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "history": self.output.history.to_json_lines(),
            }
            checkpoints.write(self.config.output, step, state, keep=self.config.keep_checkpoints)
            self.output.flush()
        self.group.wait()

    def _restore(self) -> int:
        """The step to begin with."""
        state = checkpoints.newest(self.config.output)
        if not self.group.agrees_on(None if state is None else state["step"]):
            raise PipelineError(
                f"the workers find different checkpoints in {self.config.output}: give --output a path that all nodes "
                "share, or a URI"
            )
        if state is None:
            return 0
        self.network.load_state_dict(state["network"])
        if state["averaged"] is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.output.restore(state["history"], step=state["step"])
        return int(state["step"])

    def _stop(self, what: str, next_step: str, at: int, images: list[str]) -> None:
        """Keep the state before the step `at`, which nothing but the network's statistics is ahead of, and say why."""
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._kept[at % 2])
        named = self.group.gather(images)
        self._save(at)
        if self.group.rank == 0:
            self.output.stop(f"{what}. Images: {', '.join(named)}. The state of step {at} is kept; {next_step}")
        self.group.wait()

    def _epoch(self, step: int) -> float:
        return (step + 1) * self.config.batch_size / len(self.images)

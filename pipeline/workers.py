"""The actors of a run: asked for, watched and buried. ``pipeline/schedule.py`` decides what they are given to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from pipeline import cluster
from pipeline.errors import PipelineError
from pipeline.segmenter import Segmenter
from pipeline.shard_attempts import ActorConfig, ActorProgress, Attempt, ShardOutcome
from pipeline.shards import Shard

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""How long a wait lasts when nothing happens."""

ACTOR_THREADS = 4
"""Calls an actor answers at once: two shards, ready, progress."""

MAX_FAILED_SHARDS = 2
"""Failures in a row after which an actor is replaced: a GPU that has failed once often fails ever after."""

MAX_FAILED_STARTS = 3
"""Actors that die in a row before they are up; then the run ends."""


@dataclass(kw_only=True, eq=False)
class Task:
    """A shard and what the driver knows of it."""

    shard: Shard
    urgency: int
    failures: int = 0
    suspect: bool = False
    finished: bool = False


@dataclass(kw_only=True, eq=False)
class Worker:
    """An actor and its calls under way."""

    handle: Any
    ready: Any
    """The call that loads its model."""
    up: bool = False
    calls: dict[Any, Task] = field(default_factory=dict)
    progress_call: Any = None
    progress: ActorProgress = field(default_factory=ActorProgress)
    moved: float = 0.0
    """When its progress last changed, or it was given work; time.monotonic()."""
    issued_again: bool = False
    """It stands still, and its shards went to others."""
    failed_in_a_row: int = 0
    """Shards that failed in it since the last that did not: its device may be lost."""

    @property
    def alone(self) -> bool:
        """Whether it must get nothing more for now."""
        return self.issued_again or any(task.suspect for task in self.calls.values())

    @property
    def still_seconds(self) -> float:
        """How long it has had work and finished no image."""
        return time.monotonic() - self.moved if self.calls else 0.0

    def call(self, task: Task, attempt: Attempt) -> None:
        """Give it one attempt at a shard."""
        self.calls[self.handle.segment.remote(task.shard, attempt)] = task
        self.moved = time.monotonic()

    def take_back(self, call: Any, *, failed: bool) -> Task:
        """One of its calls has come back."""
        self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0
        self.moved, self.issued_again = time.monotonic(), False
        task = self.calls.pop(call)
        if not self.calls:
            self.progress, self.progress_call = ActorProgress(images_total=self.progress.images_total), None
        return task


@dataclass(frozen=True, kw_only=True)
class Returned:
    """A task that came back: with its outcome, or with why there is none."""

    task: Task
    outcome: ShardOutcome | None = None
    error: str = ""
    killed: bool = False
    """Its worker died over it, or beside it."""


class WorkerPool:
    """Actors of one kind; ``close`` ends them all."""

    def __init__(
        self,
        load_segmenter: Callable[[], Segmenter],
        actor_config: ActorConfig,
        *,
        gpus_per_actor: float,
        cpus_per_actor: float,
    ) -> None:
        from pipeline.segment_actor import SegmentActor  # brings torch, for which --help need not wait

        self.workers: list[Worker] = []
        self.num_deaths = 0
        self._actor = ray.remote(SegmentActor).options(
            num_gpus=gpus_per_actor,
            num_cpus=cpus_per_actor,
            max_concurrency=ACTOR_THREADS,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": cluster.WORKER_ENVIRONMENT},
        )
        self._arguments = (ray.put(load_segmenter), actor_config)
        self._failed_starts = 0

    def close(self) -> None:
        """End every actor."""
        for worker in self.workers:
            ray.kill(worker.handle)

    @property
    def up(self) -> list[Worker]:
        """The workers whose model is loaded."""
        return [worker for worker in self.workers if worker.up]

    def grow(self, count: int) -> None:
        """Ask Ray for actors until there are ``count``."""
        while len(self.workers) < count:
            handle = self._actor.remote(*self._arguments)
            self.workers.append(Worker(handle=handle, ready=handle.ready.remote()))

    def release_idle(self) -> None:
        """Let workers without work go, so that an autoscaler gets their nodes back."""
        for worker in [worker for worker in self.workers if not worker.calls]:
            self.workers.remove(worker)
            ray.kill(worker.handle)

    def wait(self) -> Iterator[Returned]:
        """Wait a tick for anything to happen, and give the tasks that came back.

        Raises:
            PipelineError: the model cannot be loaded, or actors keep dying before they are up.
        """
        owners: dict[Any, Worker] = {}
        for worker in self.workers:
            if not worker.up:
                owners[worker.ready] = worker
            elif worker.calls and worker.progress_call is None:
                worker.progress_call = worker.handle.progress.remote()
            owners.update(dict.fromkeys(worker.calls, worker))
        if not owners:
            time.sleep(TICK_SECONDS)
            return
        done, _ = ray.wait(list(owners), num_returns=1, timeout=TICK_SECONDS)
        if done:
            done, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for reference in done:
            worker = owners[reference]
            if worker not in self.workers:
                continue  # its end was taken in by another of its calls
            if reference is worker.ready:
                yield from self._take_ready(worker)
            else:
                yield from self._take_outcome(worker, reference)
        for worker in self.workers:
            _take_progress(worker)

    def bury(self, worker: Worker, reason: str, *, killed: bool = True) -> Iterator[Returned]:
        """An actor is gone, or has to go: its tasks come back, under suspicion if one of them may have killed it."""
        self.num_deaths += 1
        first_line = reason.strip().partition("\n")[0] or "no reason given"
        logger.warning("actor died shards=%d reason=%s", len(worker.calls), first_line)
        self.workers.remove(worker)
        ray.kill(worker.handle)
        for task in worker.calls.values():
            yield Returned(task=task, error=f"its worker died: {first_line}", killed=killed)

    def _take_ready(self, worker: Worker) -> Iterator[Returned]:
        try:
            ray.get(worker.ready)
        except ray.exceptions.RayTaskError as error:
            raise PipelineError(f"the model could not be loaded by an actor: {error.cause}") from error
        except ray.exceptions.RayError as error:  # it died, ran out of memory, its environment failed
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise PipelineError(
                    f"{self._failed_starts} actors in a row died before they were up, the last with: {error}; "
                    "look at the node's memory and at its Ray logs"
                ) from error
            yield from self.bury(worker, str(error))
        else:
            worker.up = True
            self._failed_starts = 0

    def _take_outcome(self, worker: Worker, call: Any) -> Iterator[Returned]:
        try:
            outcome: ShardOutcome = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            task = worker.take_back(call, failed=True)
            yield Returned(task=task, error=f"{type(error.cause).__name__}: {error.cause}")
            if worker.failed_in_a_row >= MAX_FAILED_SHARDS:
                yield from self.bury(worker, f"{worker.failed_in_a_row} shards in a row failed in it", killed=False)
        except ray.exceptions.RayError as error:  # it died, or was ended for its memory
            yield from self.bury(worker, str(error))
        else:
            yield Returned(task=worker.take_back(call, failed=False), outcome=outcome)


def _take_progress(worker: Worker) -> None:
    if worker.progress_call is None:
        return
    done, _ = ray.wait([worker.progress_call], timeout=0)
    if not done:
        return
    try:
        progress: ActorProgress = ray.get(worker.progress_call)
    except ray.exceptions.RayError:
        progress = ActorProgress()  # its calls will say what happened
    if progress != worker.progress:
        worker.moved, worker.issued_again = time.monotonic(), False
    worker.progress, worker.progress_call = progress, None

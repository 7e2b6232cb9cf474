"""The schedule: shards to actors, on plain Ray actors.

Actors are asked for up to the most allowed and used as they come up, so that Ray's autoscaler sees the demand; each has
two shards in flight, so that the next one is fetched while this one finishes. The driver counts attempts itself: an
actor that dies returns its shards, a shard whose worker died is tried again in suspect mode and alone, and one that
fails for the last time is named. The shards of an actor that stands still are issued again: whoever commits first wins,
the other is harmless.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from pipeline.errors import ConfigError, PipelineError
from pipeline.model_thread import Segmenter
from pipeline.segment_actor import ActorConfig, ActorProgress, Attempt, SegmentActor, ShardOutcome
from pipeline.shards import Shard

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""How long the driver sleeps when nothing happens."""

ACTOR_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
"""glibc gives large blocks back at once and faults every page in again: half the time of RoIAlign on a CPU, measured."""

ACTOR_THREADS = 4
"""Calls an actor answers at once: two shards, ready, progress."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How shards are spread over actors."""

    max_actors: int
    """Asked for at once; used as they come up."""
    min_actors: int = 1
    """The run hands out its first shard when so many are up."""
    gpus_per_actor: float = 0
    cpus_per_actor: float = 1
    shards_in_flight: int = 2
    """For each actor."""
    max_attempts: int = 3
    """A shard that failed so often is given up and named; the run goes on with the others and exits 1."""
    stall_timeout_seconds: float = 600.0
    """An actor that finishes no image for so long has its shards issued to others too; after twice that it is ended."""
    grace_seconds: float = 20.0
    """After SIGTERM, time for shards under way to finish."""
    max_failed_starts: int = 3
    """Actors that die in a row before they are up; then the run ends."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_actors <= self.max_actors:
            raise ConfigError(
                f"actors must be N or MIN:MAX with 1 <= MIN <= MAX, got {self.min_actors}:{self.max_actors}"
            )


@dataclass(frozen=True, kw_only=True)
class Tick:
    """What is known of a run at one moment, for a progress line."""

    shards_done: int
    images_done: int
    """Committed, and ready but not committed."""
    images_failed: int
    actors_up: int
    actors_asked: int


@dataclass(kw_only=True)
class ScheduleResult:
    """How a run went."""

    outcomes: list[ShardOutcome] = field(default_factory=list)
    """One for each shard that has its commit."""
    given_up: dict[str, str] = field(default_factory=dict)
    """Shard id → its last error."""
    num_retries: int = 0
    num_actor_deaths: int = 0
    stopped: bool = False
    """By request, before all shards were done."""
    seconds: float = 0.0
    """From the first shard handed out to the last commit: the start of Ray and of the model left out."""


@dataclass(kw_only=True, eq=False)
class _Task:
    """A shard and what the driver knows of it."""

    shard: Shard
    urgency: int
    failures: int = 0
    suspect: bool = False
    finished: bool = False


@dataclass(kw_only=True, eq=False)
class _Worker:
    """An actor and its calls under way."""

    handle: Any
    ready: Any
    up: bool = False
    calls: dict[Any, _Task] = field(default_factory=dict)
    progress_call: Any = None
    progress: ActorProgress = field(default_factory=ActorProgress)
    moved: float = 0.0
    """When its progress last changed, or it was given work; time.monotonic()."""
    issued_again: bool = False
    """It stands still, and its shards went to others."""


class Schedule:
    """Runs shards to their commits. One use each."""

    def __init__(
        self,
        shards: Iterator[Shard],
        num_shards: int,
        load_segmenter: Callable[[], Segmenter],
        actor_config: ActorConfig,
        config: ScheduleConfig,
        *,
        is_suspect: Callable[[Shard], bool] = lambda _: False,
    ) -> None:
        """
        Args:
            is_suspect: whether earlier runs died over a shard, asked as each is handed out for the first time.
        """
        self.result = ScheduleResult()
        self._fresh = ((shard, order) for order, shard in enumerate(shards))
        self._num_shards = num_shards
        self._returned: deque[_Task] = deque()
        self._workers: list[_Worker] = []
        self._config, self._actor_config = config, actor_config
        self._load_segmenter = ray.put(load_segmenter)
        self._is_suspect = is_suspect
        self._failed_starts = 0
        self._started: float | None = None
        """When the first shard was handed out."""

    def run(self, on_tick: Callable[[Tick], None], stop: threading.Event) -> ScheduleResult:
        """Run until every shard has its commit or is given up.

        Args:
            on_tick: called about twice a second.
            stop: once set, nothing more is handed out and what is under way has ``grace_seconds`` to finish.

        Raises:
            PipelineError: no model could be loaded, or actors keep dying before they are up.
        """
        deadline: float | None = None
        try:
            while True:
                if stop.is_set() and deadline is None:
                    deadline = time.monotonic() + self._config.grace_seconds
                    self.result.stopped = True
                if deadline is None:
                    self._start_workers()
                    self._hand_out()
                    self._reissue_stalled()
                under_way = any(worker.calls for worker in self._workers)
                if not under_way and (deadline is not None or not self._work_left()):
                    return self.result
                if deadline is not None and time.monotonic() > deadline:
                    return self.result
                self._wait()
                on_tick(self._tick())
        finally:
            for worker in self._workers:
                ray.kill(worker.handle)

    # Handing out

    def _work_left(self) -> bool:
        unfinished = self._num_shards - len(self.result.outcomes) - len(self.result.given_up)
        return unfinished > 0

    def _start_workers(self) -> None:
        unfinished = self._num_shards - len(self.result.outcomes) - len(self.result.given_up)
        while len(self._workers) < min(self._config.max_actors, unfinished):
            actor = ray.remote(SegmentActor).options(
                num_gpus=self._config.gpus_per_actor,
                num_cpus=self._config.cpus_per_actor,
                max_concurrency=ACTOR_THREADS,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": ACTOR_ENVIRONMENT},
            )
            handle = actor.remote(self._load_segmenter, self._actor_config)
            self._workers.append(_Worker(handle=handle, ready=handle.ready.remote()))

    def _hand_out(self) -> None:
        up = [worker for worker in self._workers if worker.up]
        if self._started is None:
            if not self._workers or len(up) < min(self._config.min_actors, len(self._workers)):
                return
            self._started = time.monotonic()
        for depth in range(self._config.shards_in_flight):  # one each before anyone has two
            for worker in up:
                if len(worker.calls) == depth and not self._is_busy_alone(worker):
                    self._hand_one(worker)

    def _hand_one(self, worker: _Worker) -> None:
        for _ in range(len(self._returned)):
            task = self._returned.popleft()
            if task.finished:
                continue
            if task not in worker.calls.values() and not (task.suspect and worker.calls):
                self._call(worker, task)
                return
            self._returned.append(task)
        if any(task.suspect for task in self._returned) and worker is self._least_loaded():
            return  # let one worker run dry, so that it can take the suspect alone
        task_or_none = self._next_fresh()
        if task_or_none is not None:
            self._call(worker, task_or_none)

    def _next_fresh(self) -> _Task | None:
        following = next(self._fresh, None)
        if following is None:
            return None
        shard, urgency = following
        return _Task(shard=shard, urgency=urgency, suspect=self._is_suspect(shard))

    def _least_loaded(self) -> _Worker:
        return min((worker for worker in self._workers if worker.up), key=lambda worker: len(worker.calls))

    def _is_busy_alone(self, worker: _Worker) -> bool:
        return worker.issued_again or any(task.suspect for task in worker.calls.values())

    def _call(self, worker: _Worker, task: _Task) -> None:
        attempt = Attempt(attempt_id=uuid.uuid4().hex[:12], urgency=task.urgency, suspect=task.suspect)
        call = worker.handle.segment.remote(task.shard, attempt)
        worker.calls[call] = task
        worker.moved = time.monotonic()

    def _reissue_stalled(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            still = now - worker.moved if worker.calls else 0.0
            if still > 2 * self._config.stall_timeout_seconds:
                self._bury(worker, f"it finished no image for {still:.0f} s")
            elif still > self._config.stall_timeout_seconds and not worker.issued_again:
                logger.warning("actor stands still, its shards are issued again seconds=%.0f", still)
                worker.issued_again = True
                self.result.num_retries += len(worker.calls)
                for task in worker.calls.values():
                    task.suspect = True  # an image may be what it hangs on
                    self._returned.append(task)

    # Taking back

    def _wait(self) -> None:
        """Wait for anything to happen, then take in all that has."""
        owners: dict[Any, _Worker] = {}
        for worker in self._workers:
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
            if worker not in self._workers:
                continue  # its death was taken in by another of its calls
            if reference is worker.ready:
                self._take_ready(worker)
            elif reference in worker.calls:
                self._take_outcome(worker, reference)
        for worker in self._workers:
            self._take_progress(worker)

    def _take_ready(self, worker: _Worker) -> None:
        try:
            ray.get(worker.ready)
        except ray.exceptions.RayTaskError as error:
            raise PipelineError(f"the model could not be loaded by an actor: {error.cause}") from error
        except ray.exceptions.RayActorError as error:
            self._failed_starts += 1
            if self._failed_starts >= self._config.max_failed_starts:
                raise PipelineError(
                    f"{self._failed_starts} actors in a row died before they were up, the last with: {error}; "
                    "look at the node's memory and at its Ray logs"
                ) from error
            self._bury(worker, str(error))
        else:
            worker.up = True
            self._failed_starts = 0

    def _take_outcome(self, worker: _Worker, call: Any) -> None:
        task = worker.calls[call]
        try:
            outcome: ShardOutcome = ray.get(call)
        except ray.exceptions.RayActorError as error:
            self._bury(worker, str(error))
            return
        except ray.exceptions.RayTaskError as error:
            del worker.calls[call]
            self._fail(task, f"{type(error.cause).__name__}: {error.cause}", suspect=False)
            return
        del worker.calls[call]
        if task.finished:
            return
        task.finished = True
        self.result.given_up.pop(task.shard.shard_id, None)
        self.result.outcomes.append(outcome)
        self.result.seconds = time.monotonic() - (self._started or 0.0)
        logger.info(
            "shard done shard=%s commit=%s images=%d failed=%d instances=%d seconds=%.1f",
            outcome.shard_id,
            outcome.commit,
            outcome.images,
            sum(outcome.failed_by_reason.values()),
            outcome.instances,
            outcome.seconds,
        )

    def _take_progress(self, worker: _Worker) -> None:
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
            worker.progress, worker.moved, worker.issued_again = progress, time.monotonic(), False
        worker.progress_call = None

    def _bury(self, worker: _Worker, reason: str) -> None:
        """An actor is gone: its shards come back, each under suspicion, and another actor is asked for."""
        self.result.num_actor_deaths += 1
        first_line = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        logger.warning("actor died shards=%d reason=%s", len(worker.calls), first_line)
        self._workers.remove(worker)
        ray.kill(worker.handle)
        for task in worker.calls.values():
            self._fail(task, f"its worker died: {first_line}", suspect=True)

    def _fail(self, task: _Task, reason: str, *, suspect: bool) -> None:
        if task.finished:
            return
        task.failures += 1
        task.suspect = task.suspect or suspect
        if task.failures >= self._config.max_attempts:
            logger.error("shard given up shard=%s attempts=%d error=%s", task.shard.shard_id, task.failures, reason)
            self.result.given_up[task.shard.shard_id] = reason
            return
        logger.warning(
            "shard failed, will retry shard=%s attempt=%d error=%s", task.shard.shard_id, task.failures, reason
        )
        self.result.num_retries += 1
        self._returned.append(task)

    def _tick(self) -> Tick:
        return Tick(
            shards_done=len(self.result.outcomes),
            images_done=sum(outcome.images for outcome in self.result.outcomes)
            + sum(worker.progress.images_under_way for worker in self._workers),
            images_failed=sum(sum(outcome.failed_by_reason.values()) for outcome in self.result.outcomes),
            actors_up=sum(worker.up for worker in self._workers),
            actors_asked=len(self._workers),
        )

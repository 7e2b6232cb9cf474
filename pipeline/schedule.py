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

from pipeline.errors import ConfigError
from pipeline.segmenter import Segmenter
from pipeline.shard_attempts import ActorConfig, Attempt, ShardOutcome
from pipeline.shards import Shard
from pipeline.tally import Tally
from pipeline.workers import Returned, Task, Worker, WorkerPool

logger = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""For the first actors, after which it is said what is waited for."""


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
    retries: int = 0
    """Of shards, so far."""
    queued_bytes: int = 0
    """Decoded pixels before the models, in all actors."""


@dataclass(kw_only=True)
class ScheduleResult:
    """How a run went."""

    done: Tally = field(default_factory=Tally)
    """Of the shards that have their commit."""
    given_up: dict[str, str] = field(default_factory=dict)
    """Shard id → its last error."""
    num_retries: int = 0
    num_actor_deaths: int = 0
    stopped: bool = False
    """By request, before all shards were done."""
    seconds: float = 0.0
    """From the first shard handed out to the last commit: the start of Ray and of the model left out."""


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
        on_outcome: Callable[[ShardOutcome], None] = lambda _: None,
    ) -> None:
        """
        Args:
            is_suspect: whether earlier runs died over a shard, asked as each is handed out for the first time.
            on_outcome: called once for each shard that has its commit.
        """
        self.result = ScheduleResult()
        self._fresh = ((shard, order) for order, shard in enumerate(shards))
        self._num_shards = self._num_fresh = num_shards
        self._returned: deque[Task] = deque()
        self._config = config
        self._pool = WorkerPool(
            load_segmenter, actor_config, gpus_per_actor=config.gpus_per_actor, cpus_per_actor=config.cpus_per_actor
        )
        self._is_suspect, self._on_outcome = is_suspect, on_outcome
        self._started: float | None = None
        """When the first shard was handed out."""
        self._complains_at = time.monotonic() + WAIT_SECONDS

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
            while self._num_unfinished:
                if stop.is_set() and deadline is None:
                    deadline = time.monotonic() + self._config.grace_seconds
                    self.result.stopped = True
                if deadline is None:
                    self._ask_for_actors()
                    self._hand_out()
                    self._reissue_stalled()
                elif time.monotonic() > deadline or not any(worker.calls for worker in self._pool.workers):
                    break
                for returned in self._pool.wait():
                    self._take(returned)
                on_tick(self._tick())
        finally:
            self._pool.close()
        self.result.num_actor_deaths = self._pool.num_deaths
        return self.result

    @property
    def _num_unfinished(self) -> int:
        return self._num_shards - self.result.done.shards - len(self.result.given_up)

    # Handing out

    def _ask_for_actors(self) -> None:
        """As many as there is work for; once all shards are out, those without any may go."""
        busy = sum(bool(worker.calls) for worker in self._pool.workers)
        waiting = self._num_fresh + sum(not task.finished for task in self._returned)
        if waiting:
            self._pool.grow(min(self._config.max_actors, busy + waiting))
        elif self._started is not None:
            self._pool.release_idle()

    def _hand_out(self) -> None:
        up = self._pool.up
        if self._started is None:
            if len(up) < min(self._config.min_actors, len(self._pool.workers)):
                self._complain_of_waiting()
                return
            self._started = time.monotonic()
        for depth in range(self._config.shards_in_flight):  # one each before anyone has two
            for worker in up:
                if len(worker.calls) == depth and not worker.alone:
                    task = self._next_for(worker)
                    if task is not None:
                        attempt = Attempt(attempt_id=uuid.uuid4().hex[:12], urgency=task.urgency, suspect=task.suspect)
                        worker.call(task, attempt)

    def _complain_of_waiting(self) -> None:
        if time.monotonic() < self._complains_at:
            return
        self._complains_at += 10 * WAIT_SECONDS
        logger.warning(
            "no shard is handed out yet, for actors are not up actors=%d of=%d cpus_each=%g gpus_each=%g: the cluster"
            " starts nodes, or has no room, which `ray status` tells; --actors and --cpus-per-actor ask for less",
            *(len(self._pool.up), self._config.min_actors, self._config.cpus_per_actor, self._config.gpus_per_actor),
        )

    def _next_for(self, worker: Worker) -> Task | None:
        for _ in range(len(self._returned)):
            task = self._returned.popleft()
            if task.finished or task.failures >= self._config.max_attempts:
                continue
            if task not in worker.calls.values() and not (task.suspect and worker.calls):
                return task
            self._returned.append(task)
        usable = [other for other in self._pool.up if not other.alone]
        least_loaded = min(usable, key=lambda other: len(other.calls))
        if worker is least_loaded and any(task.suspect for task in self._returned):
            return None  # let one worker run dry, so that it can take the suspect alone
        following = next(self._fresh, None)
        if following is None:
            return None
        shard, urgency = following
        self._num_fresh -= 1
        return Task(shard=shard, urgency=urgency, suspect=self._is_suspect(shard))

    def _reissue_stalled(self) -> None:
        for worker in list(self._pool.workers):
            still = worker.still_seconds
            if still > 2 * self._config.stall_timeout_seconds:
                for returned in self._pool.bury(worker, f"it finished no image for {still:.0f} s"):
                    self._take(returned)
            elif still > self._config.stall_timeout_seconds and not worker.issued_again:
                logger.warning("actor stands still, its shards are issued again seconds=%.0f", still)
                worker.issued_again = True
                self.result.num_retries += len(worker.calls)
                for task in worker.calls.values():
                    task.suspect = True  # an image may be what it hangs on
                    self._returned.append(task)

    # Taking back

    def _take(self, returned: Returned) -> None:
        task, outcome, shard_id = returned.task, returned.outcome, returned.task.shard.shard_id
        if task.finished:
            return
        if outcome is None:
            self._take_failure(task, returned)
            return
        task.finished = True
        self.result.given_up.pop(shard_id, None)
        self.result.seconds = time.monotonic() - (self._started or 0.0)
        self.result.done.add(outcome, self.result.seconds)
        self._on_outcome(outcome)
        logger.info(
            "shard done shard=%s commit=%s images=%d failed=%d instances=%d seconds=%.1f",
            shard_id,
            outcome.commit,
            outcome.images,
            sum(outcome.failed_by_reason.values()),
            outcome.instances,
            outcome.seconds,
        )

    def _take_failure(self, task: Task, returned: Returned) -> None:
        shard_id = task.shard.shard_id
        task.failures += 1
        task.suspect = task.suspect or returned.killed
        if task.failures >= self._config.max_attempts:
            logger.error("shard given up shard=%s attempts=%d error=%s", shard_id, task.failures, returned.error)
            self.result.given_up[shard_id] = returned.error
            return
        logger.warning("shard failed, will retry shard=%s attempt=%d error=%s", shard_id, task.failures, returned.error)
        self.result.num_retries += 1
        self._returned.append(task)

    def _tick(self) -> Tick:
        done, workers = self.result.done, self._pool.workers
        return Tick(
            shards_done=done.shards,
            images_done=done.images + sum(worker.progress.images_under_way for worker in workers),
            images_failed=done.images_failed,
            actors_up=len(self._pool.up),
            actors_asked=len(workers),
            retries=self.result.num_retries,
            queued_bytes=sum(worker.progress.queued_bytes for worker in workers),
        )

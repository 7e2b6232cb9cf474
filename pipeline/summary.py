"""What a run did, in numbers: printed by ``--json``, kept in ``_runs/<run>.json``."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from pipeline import storage
from pipeline.commits import Commit
from pipeline.errors import ShardError
from pipeline.schedule import ScheduleResult
from pipeline.shards import Plan
from pipeline.tally import Tally

RUN_TIME_FORMAT = "%Y%m%dT%H%M%S%f"


def new_run_id(latest: str = "") -> str:
    """An id that sorts after the latest committed one, also where this machine's clock is behind."""
    now = datetime.now(UTC)
    if latest:
        now = max(
            now,
            datetime.strptime(latest.partition("-")[0] + "+0000", RUN_TIME_FORMAT + "%z") + timedelta(milliseconds=1),
        )
    return f"{now.strftime(RUN_TIME_FORMAT)}-{secrets.token_hex(3)}"


@dataclass(kw_only=True)
class Summary:
    """What a run did. Printed by ``--json`` and kept in ``_runs/<run>.json``."""

    run_id: str
    output: str
    weights_name: str = ""
    images_listed: int
    images_already_done: int
    images_planned: int
    images_ok: int = 0
    images_failed: int = 0
    failed_by_reason: dict[str, int] = field(default_factory=dict)
    instances: int = 0
    shards_planned: int = 0
    shards_committed: int = 0
    shards_skipped: int = 0
    shards_failed: dict[str, str] = field(default_factory=dict)
    retries: int = 0
    """Of shards."""
    storage_retries: int = 0
    """Storage calls made again after an error that may pass, by this process and by actors that committed something."""
    actor_deaths: int = 0
    seconds: float = 0.0
    """Of the whole run, from listing to the last commit."""
    plan_seconds: float = 0.0
    """Of listing and planning."""
    run_seconds: float = 0.0
    """From the first shard handed out to the last commit: the start of Ray and of the model left out."""
    images_per_second: float = 0.0
    """Images of this run over ``run_seconds``."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """What shards waited for, summed over shards."""
    actors: int = 0
    """That committed something."""
    model_busy: float = 0.0
    """Share of ``run_seconds`` that their models computed in, the mean over the actors."""
    batch_size: int = 0
    batch_halvings: int = 0
    """How often a batch was halved for want of device memory, all actors together."""
    peak_device_bytes: int = 0
    """Of the actor that used most; 0 on a CPU."""
    stopped: bool = False
    report: str = ""
    """Its page, once there is one."""

    @staticmethod
    def of_plan(plan: Plan, output: str, committed: Sequence[Commit]) -> Summary:
        """A new run's summary, with its id, before anything was done."""
        return Summary(
            run_id=new_run_id(max((commit.run_id for commit in committed), default="")),
            output=storage.public_uri(output),
            images_listed=plan.images_listed,
            images_already_done=plan.images_done,
            images_planned=plan.num_images,
            shards_planned=plan.num_shards,
            shards_skipped=plan.shards_skipped,
        )

    def fill(self, result: ScheduleResult) -> None:
        """Take in how the schedule went."""
        done = result.done
        self.failed_by_reason = dict(done.failed_by_reason)
        self.images_failed = done.images_failed
        self.images_ok = done.images - done.images_failed
        self.instances = done.instances
        self.shards_committed = done.shards
        self.shards_failed = result.given_up
        self.retries, self.actor_deaths = result.num_retries, result.num_actor_deaths
        self.stopped = result.stopped
        self.stage_seconds = {stage: round(seconds, 3) for stage, seconds in done.stage_seconds.items()}
        self._take_in(done, result.seconds)
        self.run_seconds = result.seconds
        self.images_per_second = done.images / result.seconds if result.seconds else 0.0

    def _take_in(self, done: Tally, seconds: float) -> None:
        """What actors said of themselves."""
        uses = done.actors.values()
        self.storage_retries = storage.retry_count() + sum(use.storage_retries for use in uses)
        if not uses or not seconds:
            return
        self.actors = len(uses)
        self.model_busy = round(statistics.mean(use.busy_seconds for use in uses) / seconds, 3)
        self.batch_size = max(use.batch_size for use in uses)
        self.batch_halvings = sum(use.halvings for use in uses)
        self.peak_device_bytes = max(use.peak_bytes for use in uses)

    def raise_if_incomplete(self) -> None:
        """
        Raises:
            ShardError: a planned shard has no commit; the message names it and says how to go on.
        """
        missing = self.shards_planned - self.shards_committed
        if missing <= 0:
            return
        if self.shards_failed:
            shard_id, error = next(iter(self.shards_failed.items()))
            raise ShardError(
                f"{len(self.shards_failed)} of {self.shards_planned} shards have no committed rows; the first is "
                f"{shard_id}, after its last attempt: {error}. The rest is committed; the same command tries them again"
            )
        raise ShardError(
            f"stopped with {missing} of {self.shards_planned} shards to do. What is committed stays; "
            "the same command does the rest"
        )

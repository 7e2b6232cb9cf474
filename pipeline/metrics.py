"""A run's numbers for Prometheus, through Ray: every node's agent serves them beside Ray's own.

The driver counts what shards report once they have their commit, so the counts are the table's; of two drivers with the
same work each counts the shards that it saw done, under its own run.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict

from ray.util.metrics import Counter, Gauge

from pipeline.schedule import Tick
from pipeline.shard_attempts import ShardOutcome


class RunMetrics:
    """Counters and gauges of one run; each carries the run's id."""

    def __init__(self, run_id: str) -> None:
        tags = {"run": run_id}
        self._images = _counter(
            "images", "Images with a committed row, by status and reason.", tags, "status", "reason"
        )
        self._instances = _counter("instances", "Committed instances.", tags)
        self._commits = _counter("commits", "Shards that have their commit, by how it came about.", tags, "commit")
        self._stages = _counter("stage_seconds", "What shards waited for.", tags, "stage")
        self._busy = _counter("model_busy_seconds", "Time in which models computed.", tags)
        self._retries = _counter("shard_retries", "Shards tried again.", tags)
        self._storage_retries = _counter("storage_retries", "Storage calls of actors tried again.", tags)
        self._actors = Gauge("maskline_actors", "Actors that are up.", tag_keys=("run",))
        self._actors.set_default_tags(tags)
        self._queued = Gauge("maskline_queued_bytes", "Decoded pixels that wait for the models.", tag_keys=("run",))
        self._queued.set_default_tags(tags)
        self._counted_retries = 0
        self._last = 0.0
        """When something was counted."""
        self._seen: dict[str, tuple[float, int]] = {}
        """Actor → its busy seconds and storage retries as last counted."""

    def add(self, outcome: ShardOutcome) -> None:
        """A shard that has its commit."""
        self._last = time.monotonic()
        failed = sum(outcome.failed_by_reason.values())
        _add(self._images, outcome.images - failed, status="ok", reason="")
        for reason, count in outcome.failed_by_reason.items():
            _add(self._images, count, status="failed", reason=reason)
        _add(self._instances, outcome.instances)
        _add(self._commits, 1, commit=outcome.commit)
        for stage, seconds in asdict(outcome.stages).items():
            _add(self._stages, seconds, stage=stage)
        busy, retries = self._seen.get(outcome.use.actor, (0.0, 0))
        _add(self._busy, outcome.use.busy_seconds - busy)
        _add(self._storage_retries, outcome.use.storage_retries - retries)
        self._seen[outcome.use.actor] = (
            max(busy, outcome.use.busy_seconds),
            max(retries, outcome.use.storage_retries),
        )

    def settle(self) -> None:
        """Stay until the last numbers were reported: a process that ends sooner takes them with it."""
        time.sleep(max(0.0, self._last + report_seconds() + 1.0 - time.monotonic()))

    def tick(self, tick: Tick) -> None:
        """What is known between shards."""
        self._actors.set(tick.actors_up)
        self._queued.set(tick.queued_bytes)
        _add(self._retries, tick.retries - self._counted_retries)
        self._counted_retries = tick.retries


def report_seconds() -> float:
    """How often Ray's processes report to their node's agent."""
    return int(os.environ.get("RAY_metrics_report_interval_ms", "10000")) / 1000  # noqa: SIM112  Ray's own


def _counter(name: str, description: str, tags: dict[str, str], *keys: str) -> Counter:
    counter = Counter(f"maskline_{name}", description, tag_keys=("run", *keys))
    counter.set_default_tags(tags)
    return counter


def _add(counter: Counter, value: float, **tags: str) -> None:
    if value > 0:  # a counter takes nothing else
        counter.inc(value, tags)

"""Ray as ``pipeline/workers.py`` sees it, by a clock of its own: two days of a run pass in a minute.

Actors load, work at shards one after the other, and some die over one, all at the times that a seed gives.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.exceptions

from pipeline.shard_attempts import ActorProgress, ActorUse, Attempt, ShardOutcome, StageSeconds
from pipeline.shards import Shard

START_SECONDS = 30.0
SHARD_SECONDS = (5.0, 25.0)


class SimulatedClock:
    """In place of ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(eq=False)
class Reference:
    """An answer, from a time on."""

    at: float
    answer: Any


class SimulatedRay:
    """In place of the module ``ray``."""

    exceptions = ray.exceptions

    def __init__(self, clock: SimulatedClock, *, death_rate: float) -> None:
        self.clock, self.death_rate = clock, death_rate
        self.chance = random.Random(0)
        self.num_actors = 0

    def remote(self, _: type) -> SimulatedRay:
        return self

    def options(self, **_: object) -> _ActorClass:
        return _ActorClass(self)

    def put(self, value: object) -> object:
        return value

    def kill(self, _: object) -> None:
        pass

    def wait(
        self, references: Sequence[Reference], *, num_returns: int = 1, timeout: float
    ) -> tuple[list[Reference], list[Reference]]:
        if not any(reference.at <= self.clock.now for reference in references):
            self.clock.now = min(self.clock.now + timeout, *(reference.at for reference in references))
        done = [reference for reference in references if reference.at <= self.clock.now][:num_returns]
        return done, [reference for reference in references if reference not in done]

    def get(self, reference: Reference) -> Any:
        assert reference.at <= self.clock.now
        if isinstance(reference.answer, Exception):
            raise reference.answer
        return reference.answer


@dataclass
class _ActorClass:
    ray: SimulatedRay

    def remote(self, *_: object) -> _Actor:
        self.ray.num_actors += 1
        return _Actor(self.ray, f"node:{self.ray.num_actors}")


class _Actor:
    """A handle; its methods are called as ``handle.segment.remote(…)``."""

    def __init__(self, simulated: SimulatedRay, name: str) -> None:
        self._ray, self._name = simulated, name
        self._free_at = simulated.clock.now + START_SECONDS
        self._died_at = float("inf")
        self._images = 0
        self.ready = _Method(lambda: Reference(self._free_at, 1))
        self.progress = _Method(self._progress)
        self.segment = _Method(self._segment)

    def _progress(self) -> Reference:
        self._images += 1
        return Reference(self._ray.clock.now + 0.01, ActorProgress(images_total=self._images))

    def _segment(self, shard: Shard, attempt: Attempt) -> Reference:
        chance = self._ray.chance
        self._free_at = max(self._free_at, self._ray.clock.now) + chance.uniform(*SHARD_SECONDS)
        if chance.random() < self._ray.death_rate:
            self._died_at = min(self._died_at, self._free_at)
        if self._free_at >= self._died_at:
            return Reference(self._died_at, ray.exceptions.ActorDiedError())
        outcome = ShardOutcome(
            shard_id=shard.shard_id,
            commit="won",
            images=100,
            failed_by_reason={"truncated": 1},
            instances=300,
            seconds=1.0,
            stages=StageSeconds(model=1.0),
            use=ActorUse(actor=self._name, busy_seconds=self._free_at),
        )
        return Reference(self._free_at, outcome)


@dataclass
class _Method:
    call: Any

    def remote(self, *arguments: object) -> Reference:
        reference: Reference = self.call(*arguments)
        return reference

"""What the shards of a run add up to, in memory that does not grow with their number."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

from pipeline.shard_attempts import ActorUse, ShardOutcome
from pipeline.timeline import Timeline


@dataclass(kw_only=True)
class Tally:
    """Sums over the outcomes of shards."""

    shards: int = 0
    """That have their commit."""
    images: int = 0
    instances: int = 0
    failed_by_reason: Counter[str] = field(default_factory=Counter)
    commits: Counter[str] = field(default_factory=Counter)
    """By how each came about: won, lost, found."""
    stage_seconds: Counter[str] = field(default_factory=Counter)
    actors: dict[str, ActorUse] = field(default_factory=dict)
    """Host and process → what each said of itself last."""
    timeline: Timeline = field(default_factory=Timeline)
    last_shard: str = ""

    def add(self, outcome: ShardOutcome, at: float) -> None:
        """A shard that had its commit so many seconds after the first was handed out."""
        stages = asdict(outcome.stages)
        self.shards += 1
        self.images += outcome.images
        self.instances += outcome.instances
        self.failed_by_reason.update(outcome.failed_by_reason)
        self.commits[outcome.commit] += 1
        self.stage_seconds.update(stages)
        self.timeline.add(at, seconds=outcome.seconds, images=outcome.images, stages=stages)
        before = self.actors.get(outcome.use.actor)
        if before is None or outcome.use.busy_seconds >= before.busy_seconds:  # two shards may come back in any order
            self.actors[outcome.use.actor] = outcome.use
        self.last_shard = outcome.shard_id

    @property
    def images_failed(self) -> int:
        return self.failed_by_reason.total()

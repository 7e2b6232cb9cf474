"""The records that pass between the driver and its actors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline import decode
from pipeline.archive import ArchiveLimits
from pipeline.decode import DecodeLimits
from pipeline.isolated_decoder import Decode
from pipeline.results import TableMetadata


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """What an actor needs beside its model."""

    output: str
    """The results table's root."""
    run_id: str
    score_threshold: float
    metadata: TableMetadata
    exclusive_commits: bool = True
    """The store honours create-only."""
    archive_limits: ArchiveLimits = field(default_factory=ArchiveLimits)
    decode_limits: DecodeLimits = field(default_factory=DecodeLimits)
    decode: Decode = decode.decode
    """A module-level function."""
    shrink_jpegs: bool = False
    """Decode a JPEG to a half, a quarter or an eighth of its sides where the model's input is no larger."""
    fetch_threads: int = 8
    decode_threads: int = 2
    max_decoded_bytes: int = 512 * 1024**2
    """Pixels of one shard that may wait before the model."""
    decode_timeout_seconds: float = 60.0
    """In suspect mode, where a decoder can be ended."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at one shard."""

    attempt_id: str
    urgency: int
    """The shard's place in the plan: of two shards in one actor the lower one has the model first."""
    suspect: bool = False
    """An earlier attempt killed its worker: decode in a child process, one image at a time."""


@dataclass(kw_only=True)
class StageSeconds:
    """Where a shard's time went, in seconds of waiting of the shard's own thread."""

    fetch: float = 0.0
    decode: float = 0.0
    model: float = 0.0
    commit: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ActorProgress:
    """How far an actor is, between two outcomes."""

    images_under_way: int = 0
    """Rows ready of shards that are not committed yet."""
    images_total: int = 0
    """Rows made since the actor began."""
    queued_bytes: int = field(default=0, compare=False)
    """Pixels that are decoded and wait for the model, or are in it; no sign of life, so not compared."""


@dataclass(frozen=True, kw_only=True)
class ActorUse:
    """What one actor asked of its device and of storage since it began."""

    actor: str = ""
    """Host and process."""
    batch_size: int = 0
    """Images of one padded size that are given at once, where memory allows."""
    halvings: int = 0
    """How often a batch was halved for want of device memory."""
    peak_bytes: int = 0
    """Of device memory; 0 on a CPU."""
    busy_seconds: float = 0.0
    """Spent in the model."""
    storage_retries: int = 0
    """Storage calls made again after an error that may pass."""


@dataclass(frozen=True, kw_only=True)
class ShardOutcome:
    """What became of one attempt. All its rows are committed, by it or by another."""

    shard_id: str
    commit: Literal["won", "lost", "found"]
    """``found``: the commit was there before the attempt began."""
    images: int
    failed_by_reason: dict[str, int]
    instances: int
    seconds: float
    stages: StageSeconds
    use: ActorUse

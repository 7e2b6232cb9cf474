"""The options of ``maskline segment``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.decode import DecodeLimits
from pipeline.errors import ConfigError
from pipeline.notify import check_webhook
from pipeline.schedule import ScheduleConfig
from pipeline.shards import ShardConfig


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Segment every image of one or more archives into a results table."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """A folder or prefix, a glob, .tar, .tar.gz, .zip, .parquet with encoded bytes, or a .txt/.csv/.parquet manifest of
    URIs; local, s3://, gs:// or az://."""
    output: str
    """The results table's root: a folder or a URI. The same table again is how a run resumes."""
    weights: str
    """A weights file or its URI, or a name: demo and nuclei come with maskline, coco is downloaded from torchvision."""
    weights_sha256: str | None = None
    """What the weights file's sha256 must be, hexadecimal; another file is refused before anything is started."""
    score_threshold: float = 0.5
    """Detections below it are not written."""
    images_per_shard: int = ShardConfig.images_per_shard
    """The unit of work, of retry and of commit."""
    actors: str = "auto"
    """N, MIN:MAX, or auto: one for each GPU (or for each node without GPUs)."""
    cpus_per_actor: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """CPUs an actor asks of Ray and uses; by default its share of a node."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes GPUs where the cluster has any."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model's trunk and heads; boxes are always float32. auto is bf16 on cuda, fp32 on a CPU."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images of one padded size that the model is given at once; by default 16 on cuda, 1 on a CPU. Where device memory
    runs out a batch is halved."""
    max_images: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Do no more than this many images in this run."""
    max_image_pixels: int = DecodeLimits.max_image_pixels
    """Larger images become failed rows, reason too_large, before they are decoded."""
    shrink_jpegs: bool = False
    """Decode a JPEG to a half, a quarter or an eighth of its sides where the model's input is no larger: a large
    photograph then takes a third less time to decode and a fraction of the memory, and scores change a little."""
    stall_timeout: float = ScheduleConfig.stall_timeout_seconds
    """Seconds without one finished image after which an actor's shards are issued to others too."""
    retry_failed: bool = False
    """Do images again whose row says failed."""
    address: str | None = None
    """A Ray cluster's address; by default RAY_ADDRESS, else a local one is started for the run."""
    notify: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """A webhook that is told of the run's end, good or bad, by one POST of JSON."""
    report: bool = True
    """Make a page of the run at its end, _runs/RUN.html; maskline report makes it too."""
    price_per_hour: Annotated[float | None, tyro.conf.arg(metavar="PRICE")] = None
    """Of one actor with its accelerator: the report then has the price of a million images."""
    dry_run: bool = False
    """Show the plan and stop."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    log: Literal["text", "json"] = "text"
    """Standard error: lines for people, or a JSON object for each event, finished shards among them."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("no input given; name a folder, an archive or a manifest")
        if not 0 <= self.score_threshold < 1:
            raise ConfigError(f"score_threshold must lie in [0, 1), got {self.score_threshold}")
        parse_actors(self.actors)
        if self.cpus_per_actor is not None and self.cpus_per_actor <= 0:
            raise ConfigError(f"cpus_per_actor must be more than 0, got {self.cpus_per_actor}")
        if self.weights_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.weights_sha256):
            raise ConfigError(f"weights_sha256 must be 64 hexadecimal digits, got {self.weights_sha256!r}")
        if self.stall_timeout <= 0:
            raise ConfigError(f"stall_timeout must be more than 0 seconds, got {self.stall_timeout}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < float("inf"):
            raise ConfigError(f"price_per_hour must be at least 0, got {self.price_per_hour}")
        if self.notify is not None:
            check_webhook(self.notify)
        self.shard_config()
        self.decode_limits()

    def shard_config(self) -> ShardConfig:
        return ShardConfig(
            images_per_shard=self.images_per_shard, max_images=self.max_images, retry_failed=self.retry_failed
        )

    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(max_image_pixels=self.max_image_pixels)


def parse_actors(actors: str) -> tuple[int, int] | None:
    """``N`` or ``MIN:MAX`` as bounds; None for auto."""
    if actors == "auto":
        return None
    parts = actors.split(":")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"actors must be N, MIN:MAX or auto, got {actors!r}")
    high = int(parts[-1])
    low = int(parts[0]) if len(parts) == 2 else min(1, high)
    ScheduleConfig(min_actors=low, max_actors=high)
    return low, high

"""maskline segment: archives in, committed instance rows out. The same command again does only what is missing."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import duckdb
import tyro

import model
from jobs.command import run
from model.weights import NAMES, WeightsInfo
from pipeline import cluster, commits, storage
from pipeline.archive import ArchiveLimits, Listing, list_images
from pipeline.cluster import Device
from pipeline.decode import DecodeLimits
from pipeline.errors import ConfigError, PipelineError
from pipeline.model_thread import Segmenter
from pipeline.progress import ProgressView
from pipeline.report import write_report
from pipeline.results import Results, TableMetadata, open_results
from pipeline.schedule import Schedule, ScheduleConfig
from pipeline.shard_attempts import ActorConfig
from pipeline.shards import Plan, ShardConfig
from pipeline.summary import Summary
from pipeline.timeline import Timeline

logger = logging.getLogger(__name__)

SUSPECT_AFTER_ATTEMPTS = 2
"""A shard that so many attempts of earlier runs began and none committed starts in suspect mode."""


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
    report: bool = True
    """Make a page of the run at its end, _runs/RUN.html; maskline report makes it too."""
    price_per_hour: Annotated[float | None, tyro.conf.arg(metavar="PRICE")] = None
    """Of one actor with its accelerator: the report then has the price of a million images."""
    dry_run: bool = False
    """Show the plan and stop."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""

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


def segment(config: SegmentConfig, load_segmenter: Callable[[], Segmenter] | None = None) -> Summary:
    """Run it. ``load_segmenter`` takes the place of the weights' own model (benchmarks use it).

    Raises:
        ConfigError: the request is wrong; nothing was started.
    """
    started = time.monotonic()
    config = replace(config, output=storage.public_uri(config.output))  # absolute: actors have folders of their own
    device = cluster.choose_device(config.device, config.address)
    precision = ("bf16" if device == "cuda" else "fp32") if config.precision == "auto" else config.precision
    weights, info = read_weights(config.weights, sha256=config.weights_sha256)
    metadata = describe_table(config, info, precision)
    plan_started = time.monotonic()
    listing = Listing()
    committed = commits.read_table(config.output)
    with Plan(
        list_images(config.inputs, exclude=config.output, listing=listing),
        Results(config.output, committed),
        weights_sha256=info.sha256,
        settings_hash=metadata.settings_hash,
        config=config.shard_config(),
    ) as plan:
        summary = Summary.of_plan(plan, config.output, committed)
        summary.weights_name = info.name
        summary.plan_seconds = time.monotonic() - plan_started
        _print_plan(plan, listing, config)
        if config.dry_run or plan.num_images == 0:
            summary.seconds = time.monotonic() - started
            return summary
        try:
            commits.create_table(config.output)
        except OSError as error:
            raise ConfigError(f"cannot write to {config.output}: {error}; check --output") from error
        load = load_segmenter or functools.partial(
            load_weights, weights, info.name, device, precision, config.batch_size
        )
        timeline = _run_plan(config, plan, summary, metadata, load, device)
    summary.seconds = time.monotonic() - started
    storage.write_bytes(
        storage.join(config.output, "_runs", f"{summary.run_id}.json"),
        json.dumps(asdict(summary) | {"timeline": asdict(timeline)}, indent=1).encode(),
    )
    if config.report:
        _report(config, summary)
    return summary


def _run_plan(
    config: SegmentConfig,
    plan: Plan,
    summary: Summary,
    metadata: TableMetadata,
    load_segmenter: Callable[[], Segmenter],
    device: Device,
) -> Timeline:
    cluster.connect(config.address)
    shape = cluster.actor_shape(device)
    bounds = parse_actors(config.actors) or (1, max(1, shape.room))
    cpus = config.cpus_per_actor or shape.cpus_for(bounds[1])
    attempts = commits.count_attempts(config.output)
    exclusive = storage.honours_create_exclusive(config.output)
    if not exclusive:
        print(f"note: {config.output} does not honour create-only writes: the last writer wins", file=sys.stderr)
    schedule = Schedule(
        plan.shards(),
        plan.num_shards,
        load_segmenter,
        ActorConfig(
            output=config.output,
            run_id=summary.run_id,
            score_threshold=config.score_threshold,
            metadata=metadata,
            exclusive_commits=exclusive,
            decode_limits=config.decode_limits(),
            shrink_jpegs=config.shrink_jpegs,
            decode_threads=max(2, int(cpus)),
        ),
        ScheduleConfig(
            min_actors=bounds[0],
            max_actors=bounds[1],
            gpus_per_actor=shape.gpus,
            cpus_per_actor=cpus,
            stall_timeout_seconds=config.stall_timeout,
        ),
        is_suspect=lambda shard: attempts[shard.shard_id] >= SUSPECT_AFTER_ATTEMPTS,
    )
    with _stop_on_signal() as stop, ProgressView(plan.num_images, plan.num_shards) as view:
        result = schedule.run(view, stop)
    summary.fill(result)
    shard_id = result.done.last_shard
    if shard_id and commits.read_commit(config.output, shard_id) is None:
        raise PipelineError(
            f"an actor committed shard {shard_id}, but {config.output} as seen here has no such commit: "
            "give --output a path that all nodes share, or a URI"
        )
    return result.done.timeline


def _report(config: SegmentConfig, summary: Summary) -> None:
    """The page of the run. The run is whole without it."""
    try:
        summary.report = write_report(open_results(config.output), summary.run_id, price_per_hour=config.price_per_hour)
    except (PipelineError, OSError, duckdb.Error) as error:
        logger.warning("the run has no report: %s; maskline report %s tries again", error, config.output)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C set the event; the handlers that were there come back."""
    stop = threading.Event()
    handler = functools.partial(_request_stop, stop)
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _request_stop(stop: threading.Event, number: int, frame: object) -> None:
    if stop.is_set():
        raise KeyboardInterrupt
    print(f"{signal.Signals(number).name}: finishing what is under way; once more to stop at once", file=sys.stderr)
    stop.set()


def read_weights(source: str, *, sha256: str | None = None) -> tuple[str | bytes, WeightsInfo]:
    """The weights' bytes (a name stays a name) and what they are.

    Raises:
        ConfigError: there is no such file, it is not weights that this model understands, or not those of the `sha256`.
    """
    shown = source if source in NAMES else storage.public_uri(source)
    try:
        weights: str | bytes = source if source in NAMES else storage.read_bytes(source)
        info = model.describe(weights, name=source if isinstance(weights, str) else source.rsplit("/", 1)[-1])
    except FileNotFoundError as error:
        names = ", ".join(NAMES)
        raise ConfigError(f"no weights at {source}: give a file, a URI, or one of the names {names}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"weights {shown}: {error}") from error
    if sha256 is not None and info.sha256 != sha256.lower():
        raise ConfigError(
            f"weights {shown} have sha256 {info.sha256}, but --weights-sha256 is "
            f"{sha256.lower()}: this is not the file you pinned; see where it comes from before you pin it anew"
        )
    if info.config.proposals == "given":
        raise ConfigError(
            f"weights {shown} are a Fast R-CNN, which needs proposals for every image; "
            "give weights with an RPN, or call model.load(...).predict(images, proposals=...)"
        )
    return weights, info


def load_weights(
    weights: str | bytes, name: str, device: Device, precision: Literal["fp32", "bf16"], batch_size: int | None = None
) -> Segmenter:
    """In an actor: the model on its device, with the actor's own share of threads."""
    import ray
    import torch

    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
    net = model.load(weights, device=device, precision=precision, name=name)
    net.batch_size = batch_size or net.batch_size
    return net


def describe_table(config: SegmentConfig, info: WeightsInfo, precision: str) -> TableMetadata:
    """What rows were made with. Its hash tells the rows of these settings from others."""
    settings: dict[str, Any] = {
        "score_threshold": config.score_threshold,
        "precision": precision,
        "decode_limits": asdict(config.decode_limits()),
        "archive_limits": asdict(ArchiveLimits()),
    }
    if config.shrink_jpegs:
        settings["shrink_jpegs"] = True
    return TableMetadata(
        weights_name=info.name,
        weights_sha256=info.sha256,
        settings_hash=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        settings=settings,
        categories=info.categories,
    )


def _print_plan(plan: Plan, listing: Listing, config: SegmentConfig) -> None:
    megabytes = plan.num_bytes / 1e6
    print(
        f"{plan.images_listed} images listed, {plan.images_done} already done, {plan.num_images} to do"
        f" ({megabytes:.1f} MB) in {plan.num_shards} shards → {storage.public_uri(config.output)}",
        file=sys.stderr,
    )
    if listing.skipped:
        kinds = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in listing.skipped.items())
        print(f"skipped as not images: {kinds}", file=sys.stderr)


def main(config: SegmentConfig) -> None:
    """The command: run, and say what came of it."""
    summary = segment(config)
    if config.json:
        print(json.dumps(asdict(summary)))
    if config.dry_run:
        print("dry run: nothing was started", file=sys.stderr)
        return
    summary.raise_if_incomplete()
    if config.json:
        return
    print(
        f"{summary.images_ok} ok, {summary.images_failed} failed, {summary.instances} instances in"
        f" {summary.seconds:.1f} s ({summary.images_per_second:.1f} images/s) → {summary.output}"
    )
    for reason, count in sorted(summary.failed_by_reason.items()):
        print(f"  failed, {reason}: {count}")
    if summary.report:
        print(f"  report: {summary.report}")
    memory = f", at most {summary.peak_device_bytes / 1e9:.1f} GB of device memory" if summary.peak_device_bytes else ""
    print(f"  the model computed {summary.model_busy:.0%} of the time, in batches of {summary.batch_size}{memory}")
    if summary.batch_halvings:
        print(
            f"  device memory ran out {summary.batch_halvings} times, and batches were halved; a smaller --batch-size"
            " saves that"
        )


if __name__ == "__main__":
    run("segment", SegmentConfig, main)

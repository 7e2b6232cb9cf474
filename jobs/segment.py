"""maskline segment: archives in, committed instance rows out. The same command again does only what is missing."""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import duckdb

import model
from jobs import logs
from jobs.command import run
from jobs.network_weights import load_weights, read_weights
from jobs.segment_config import SegmentConfig, parse_actors
from pipeline import cluster, commits, storage
from pipeline.archive import ArchiveLimits, Listing, list_images
from pipeline.cluster import Device
from pipeline.errors import ConfigError, PipelineError
from pipeline.metrics import RunMetrics
from pipeline.notify import notify
from pipeline.progress import ProgressView
from pipeline.report import write_report
from pipeline.results import Results, TableMetadata, open_results
from pipeline.schedule import Schedule, ScheduleConfig, Tick
from pipeline.segmenter import Segmenter
from pipeline.shard_attempts import ActorConfig
from pipeline.shards import Plan
from pipeline.summary import Summary
from pipeline.timeline import Timeline
from pipeline.uris import refuse_credentials

logger = logging.getLogger("jobs.segment")  # also where this file is the command itself

SUSPECT_AFTER_ATTEMPTS = 2
"""A shard that so many attempts of earlier runs began and none committed starts in suspect mode."""

STOP_SECONDS = 60.0
"""A run asked to stop that is still there so long after its grace period hangs; it says where, and ends with 1."""


def _warn_of_missing_kernel() -> None:
    """Of this machine, which the others are taken to be like."""
    from model import compiled_winograd  # brings torch, for which --help need not wait

    reason = compiled_winograd.why_missing()
    if reason is not None:
        logger.warning(
            "the model is slower than it could be, without its kernel in C: %s; with GCC, install again", reason
        )


def segment(config: SegmentConfig, load_segmenter: Callable[[], Segmenter] | None = None) -> Summary:
    """Run it. ``load_segmenter`` takes the place of the weights' own model (benchmarks use it).

    Raises:
        ConfigError: the request is wrong; nothing was started.
    """
    started = time.monotonic()
    refuse_credentials(config.output)
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
        logger.info("the model computes in %s on %s", precision, device)
        if device == "cpu":
            _warn_of_missing_kernel()
        try:
            commits.create_table(config.output)
        except OSError as error:
            raise ConfigError(f"cannot write to {config.output}: {error}; check --output") from error
        load = load_segmenter or functools.partial(
            load_weights, weights, info.name, device, precision, config.batch_size
        )
        cluster.connect(config.address)  # first: Ray puts handlers of its own in the place of ours
        with _stop_on_signal() as stop:
            timeline, metrics = _run_plan(config, plan, summary, metadata, load, device, stop)
            summary.seconds = time.monotonic() - started
            storage.write_bytes(
                storage.join(config.output, "_runs", f"{summary.run_id}.json"),
                json.dumps(asdict(summary) | {"timeline": asdict(timeline)}, indent=1).encode(),
            )
            if config.report:
                _report(config, summary)
            if cluster.cluster_address(config.address) is not None:  # nobody scrapes a local one
                metrics.settle()
    return summary


def _run_plan(
    config: SegmentConfig,
    plan: Plan,
    summary: Summary,
    metadata: TableMetadata,
    load_segmenter: Callable[[], Segmenter],
    device: Device,
    stop: threading.Event,
) -> tuple[Timeline, RunMetrics]:
    shape = cluster.actor_shape(device)
    bounds = parse_actors(config.actors) or (1, max(1, shape.room))
    cpus = config.cpus_per_actor or shape.cpus_for(bounds[1])
    attempts = commits.count_attempts(config.output)
    exclusive = storage.honours_create_exclusive(config.output)
    if not exclusive:
        logger.warning("the last writer wins, for the store honours no create-only writes output=%s", config.output)
    metrics = RunMetrics(summary.run_id)
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
        on_outcome=metrics.add,
    )
    with _progress(config, plan) as view:

        def on_tick(tick: Tick) -> None:
            view(tick)
            metrics.tick(tick)

        result = schedule.run(on_tick, stop)
    summary.fill(result)
    shard_id = result.done.last_shard
    if shard_id and commits.read_commit(config.output, shard_id) is None:
        raise PipelineError(
            f"an actor committed shard {shard_id}, but {config.output} as seen here has no such commit: "
            "give --output a path that all nodes share, or a URI"
        )
    return result.done.timeline, metrics


def _progress(config: SegmentConfig, plan: Plan) -> ProgressView:
    return ProgressView(plan.num_images, plan.num_shards, bar=config.log == "text" and sys.stderr.isatty())


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
        faulthandler.cancel_dump_traceback_later()
        for number, old in before.items():
            signal.signal(number, old)


def _request_stop(stop: threading.Event, number: int, frame: object) -> None:
    if stop.is_set():
        raise KeyboardInterrupt
    logger.info("%s: finishing what is under way; once more to stop at once", signal.Signals(number).name)
    stop.set()
    faulthandler.dump_traceback_later(ScheduleConfig.grace_seconds + STOP_SECONDS, exit=True)


def describe_table(config: SegmentConfig, info: model.WeightsInfo, precision: str) -> TableMetadata:
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


def _sentence(summary: Summary) -> str:
    if not summary.images_planned:
        return f"nothing to do: {summary.images_already_done} images have their rows → {summary.output}"
    return (
        f"{summary.images_ok} ok, {summary.images_failed} failed, {summary.instances} instances in"
        f" {summary.seconds:.1f} s ({summary.images_per_second:.1f} images/s) → {summary.output}"
    )


def _status(summary: Summary) -> str:
    """As a webhook is told it: what raise_if_incomplete makes of it, in a word."""
    if summary.shards_committed >= summary.shards_planned:
        return "done"
    return "stopped" if summary.stopped else "incomplete"


def _print_plan(plan: Plan, listing: Listing, config: SegmentConfig) -> None:
    logger.info(
        "%d images listed, %d already done, %d to do (%.1f MB) in %d shards → %s",
        plan.images_listed,
        plan.images_done,
        plan.num_images,
        plan.num_bytes / 1e6,
        plan.num_shards,
        storage.public_uri(config.output),
    )
    if listing.skipped:
        kinds = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in listing.skipped.items())
        logger.info("skipped as not images: %s", kinds)


def main(config: SegmentConfig) -> None:
    """The command: run, and say what came of it."""
    if config.log == "json":
        logs.as_json()
    try:
        summary = segment(config)
    except Exception as error:
        if config.notify is not None:
            output = storage.public_uri(config.output)
            notify(config.notify, f"maskline segment failed: {error}", {"output": output, "status": "failed"})
        raise
    if config.notify is not None and not config.dry_run:
        notify(config.notify, _sentence(summary), asdict(summary) | {"status": _status(summary)})
    if config.json:
        print(json.dumps(asdict(summary)))
    if config.dry_run:
        logger.info("dry run: nothing was started")
        return
    summary.raise_if_incomplete()
    if config.json:
        return
    print(_sentence(summary))
    if not summary.images_planned:
        return
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

"""One actor: shards in, commits out. fetch → decode → batch → model → encode → Parquet → commit, all in one process.

Two shards may be under way at once: the later one is fetched and decoded while the model finishes the earlier one.
No pixels leave the process, and whatever waits is bounded in bytes.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

from model.structures import Detections, ImageSize
from pipeline import commits, decode, results
from pipeline.archive import read_images
from pipeline.batching import DecodedImage, batches
from pipeline.commits import Commit
from pipeline.decode import ImageHeader
from pipeline.errors import DecodeError
from pipeline.isolated_decoder import IsolatedDecoder
from pipeline.loaded import keep_loaded
from pipeline.model_thread import ModelThread
from pipeline.ordered_reads import on_pool
from pipeline.results import ShardRows
from pipeline.segmenter import Segmenter
from pipeline.shard_attempts import ActorConfig, ActorProgress, Attempt, ShardOutcome, StageSeconds
from pipeline.shards import Shard

logger = logging.getLogger(__name__)

BATCHES_IN_FLIGHT = 2
"""One in the model, one ready behind it."""

IMAGES_PER_TASK = 4
"""Images that a decode thread takes at a time."""

T = TypeVar("T")
Payloads = Iterator[tuple[int, bytes | DecodeError]]


@dataclass(eq=False)
class Work:
    """One attempt under way."""

    rows: ShardRows
    stages: StageSeconds = field(default_factory=StageSeconds)
    queued_bytes: int = 0
    """Pixels that are decoded and not yet through the model."""


class SegmentActor:
    """Holds a model and segments shards. A plain class: Ray wraps it in ``pipeline/workers.py``."""

    def __init__(self, load_segmenter: Callable[[], Segmenter], config: ActorConfig) -> None:
        self.config = config
        self._load_segmenter = load_segmenter
        self._decoders = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._images_under_way = self._images_total = 0
        self._works: list[Work] = []
        self._lock = threading.Lock()

    def ready(self) -> int:
        """Load the decoders and the model, and answer with the process id. Called once, before any shard."""
        decode.fast_operators()
        self._model = ModelThread(self._load_segmenter, self.config.score_threshold)
        keep_loaded()
        return os.getpid()

    def progress(self) -> ActorProgress:
        """How far it is."""
        with self._lock:
            return ActorProgress(
                images_under_way=self._images_under_way,
                images_total=self._images_total,
                queued_bytes=sum(work.queued_bytes for work in self._works),
            )

    def segment(self, shard: Shard, attempt: Attempt) -> ShardOutcome:
        """Segment one shard and commit its rows.

        Raises:
            CommitError: the store did not take the commit. Errors of the store that outlive their retries pass through.
        """
        started = time.perf_counter()
        found = commits.read_commit(self.config.output, shard.shard_id)
        if found is not None:
            return ShardOutcome(
                shard_id=shard.shard_id,
                commit="found",
                images=found.images,
                failed_by_reason=found.failed_by_reason,
                instances=found.instances,
                seconds=time.perf_counter() - started,
                stages=StageSeconds(),
                use=self._model.use(),
            )
        commits.begin_attempt(
            self.config.output,
            shard.shard_id,
            attempt.attempt_id,
            run_id=self.config.run_id,
            host=socket.gethostname(),
            suspect=attempt.suspect,
        )
        rows = ShardRows(shard.items, shard.shard_id, self.config.run_id)
        work = Work(rows)
        with self._lock:
            self._works.append(work)
        try:
            self._fill(work, attempt)
            commit_started = time.perf_counter()
            outcome = self._publish(rows, shard, attempt)
            work.stages.commit = time.perf_counter() - commit_started
        finally:
            with self._lock:
                self._works.remove(work)
            self._count(-len(rows.images), made=0)
        return ShardOutcome(
            shard_id=shard.shard_id,
            commit=outcome,
            images=shard.num_images,
            failed_by_reason=rows.failed_by_reason(),
            instances=rows.num_instances,
            seconds=time.perf_counter() - started,
            stages=work.stages,
            use=self._model.use(),
        )

    def _fill(self, work: Work, attempt: Attempt) -> None:
        """Give every item of the shard its row."""
        config, segmenter = self.config, self._model.segmenter
        rows, stages = work.rows, work.stages
        fetched = read_images(rows.items, limits=config.archive_limits, threads=config.fetch_threads)
        payloads = _timed(fetched, stages, "fetch")
        decoded = self._decode_isolated(payloads, work) if attempt.suspect else self._decode(payloads, work)
        batched = batches(
            _timed(decoded, stages, "decode"),
            batch_size=1 if attempt.suspect else segmenter.batch_size,
            shape_of=lambda image: segmenter.padded_size(image.size),
            max_waiting_bytes=config.max_decoded_bytes // 2,
        )
        in_flight: deque[tuple[list[DecodedImage], Future[list[Detections]]]] = deque()
        for batch in batched:
            pixels, sizes = [image.pixels for image in batch], [image.size for image in batch]
            in_flight.append((batch, self._model.submit(attempt.urgency, pixels, sizes)))
            if len(in_flight) > BATCHES_IN_FLIGHT:
                self._collect(*in_flight.popleft(), work)
        while in_flight:
            self._collect(*in_flight.popleft(), work)
        stages.decode -= stages.fetch  # which it waited for in its turn

    def _decode(self, payloads: Payloads, work: Work) -> Iterator[DecodedImage]:
        """Decode on threads, in order, in a window bounded by the bytes of its pixels. Bad images become rows here."""
        decoded = on_pool(
            self._decode_calls(payloads, work),
            self._decoders,
            2 * self._model.segmenter.batch_size + 2 * IMAGES_PER_TASK * self.config.decode_threads,
            self.config.max_decoded_bytes,
            per_task=IMAGES_PER_TASK,
        )
        for image in decoded:
            if isinstance(image, DecodedImage):
                yield image
            else:
                self._add_failed(work.rows, *image)

    def _decode_calls(
        self, payloads: Payloads, work: Work
    ) -> Iterator[tuple[int, Callable[[], DecodedImage | tuple[int, DecodeError, int]]]]:
        """What is to be decoded, with the bytes of its pixels, known from its header."""
        for index, data in payloads:
            try:
                if isinstance(data, DecodeError):
                    raise data
                header = self._shrunk(decode.inspect(data, self.config.decode_limits))
            except DecodeError as error:
                self._add_failed(work.rows, index, error, data)
            else:
                yield _decoded_bytes(header), partial(self._decode_one, work, index, data, header)

    def _decode_one(
        self, work: Work, index: int, data: bytes, header: ImageHeader
    ) -> DecodedImage | tuple[int, DecodeError, int]:
        try:
            pixels = self.config.decode(data, header)
        except DecodeError as error:
            return index, error, len(data)
        self._queue(work, pixels.nbytes)
        return DecodedImage(
            index=index,
            pixels=pixels,
            size=header.oriented_size,
            orientation=header.orientation,
            num_bytes=len(data),
        )

    def _decode_isolated(self, payloads: Payloads, work: Work) -> Iterator[DecodedImage]:
        """Decode one image at a time in a child process."""
        config = self.config
        with IsolatedDecoder(
            config.decode, config.decode_limits, timeout_seconds=config.decode_timeout_seconds
        ) as child:
            for index, data in payloads:
                try:
                    if isinstance(data, DecodeError):
                        raise data
                    size, shrink = None, 1
                    if config.shrink_jpegs and data.startswith(decode.JPEG_MAGIC):  # its header is read in Python alone
                        header = self._shrunk(decode.inspect(data, config.decode_limits))
                        size, shrink = header.oriented_size, header.shrink
                    pixels, orientation = child.decode(data, shrink)
                except DecodeError as error:
                    self._add_failed(work.rows, index, error, data)
                else:
                    self._queue(work, pixels.nbytes)
                    yield DecodedImage(
                        index=index,
                        pixels=pixels,
                        size=size or ImageSize(*pixels.shape[:2]),
                        orientation=orientation,
                        num_bytes=len(data),
                    )

    def _shrunk(self, header: ImageHeader) -> ImageHeader:
        """As small as the model's input allows, where that is wanted."""
        if not self.config.shrink_jpegs:
            return header
        return decode.shrunk(header, self._model.segmenter.padded_size(header.oriented_size))

    def _collect(self, batch: list[DecodedImage], future: Future[list[Detections]], work: Work) -> None:
        waited = time.perf_counter()
        for image, detections in zip(batch, future.result(), strict=True):
            work.rows.add_ok(image.index, image.size, image.orientation, image.num_bytes, detections)
        self._queue(work, -sum(image.pixels.nbytes for image in batch))
        work.stages.model += time.perf_counter() - waited
        self._count(len(batch), made=len(batch))

    def _add_failed(self, rows: ShardRows, index: int, error: DecodeError, data: bytes | DecodeError | int) -> None:
        num_bytes = len(data) if isinstance(data, bytes) else data if isinstance(data, int) else None
        rows.add_failed(index, error, num_bytes)
        self._count(1, made=1)

    def _publish(self, rows: ShardRows, shard: Shard, attempt: Attempt) -> Literal["won", "lost"]:
        config = self.config
        file_name = f"{shard.shard_id}-{attempt.attempt_id}"
        tables = rows.tables()
        files = tuple(
            results.write_table(config.output, name, tables[name], file_name, config.metadata, config.run_id)
            for name in ("images", "instances")
        )
        commit = Commit(
            shard_id=shard.shard_id,
            attempt_id=attempt.attempt_id,
            run_id=config.run_id,
            weights_sha256=config.metadata.weights_sha256,
            settings_hash=config.metadata.settings_hash,
            inputs_hash=shard.inputs_hash,
            images=shard.num_images,
            failed_by_reason=rows.failed_by_reason(),
            instances=rows.num_instances,
            files=files,
        )
        return commits.publish(config.output, commit, exclusive=config.exclusive_commits)

    def _count(self, under_way: int, *, made: int) -> None:
        with self._lock:
            self._images_under_way += under_way
            self._images_total += made

    def _queue(self, work: Work, num_bytes: int) -> None:
        with self._lock:
            work.queued_bytes += num_bytes


def _decoded_bytes(header: ImageHeader) -> int:
    height, width = header.decoded_size
    return 3 * height * width


def _timed(source: Iterator[T], stages: StageSeconds, stage: Literal["fetch", "decode"]) -> Iterator[T]:
    """The source's elements; the time it takes to give them is added to the stage."""
    while True:
        started = time.perf_counter()
        element = next(source, None)
        setattr(stages, stage, getattr(stages, stage) + time.perf_counter() - started)
        if element is None:
            return
        yield element

"""The one thread that owns the model and its device: batches in by urgency, detections out as futures.

Two shards of one actor share it. Batches of the earlier shard go first and the later one fills the gaps, which hides
the edge between two shards. Encoding (paste, run lengths) runs on a thread beside it.

On a CPU the model is loaded, warmed and run by this thread alone, and encoding keeps to one core: OpenMP gives every
thread that computes a team of its own, and once the teams outnumber the cores each team sleeps between two operations
and must be woken for the next.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import PriorityQueue
from typing import Any, NamedTuple

import torch

from model.structures import Detections, ImageSize, sizes_of
from pipeline import storage
from pipeline.segmenter import Pixels, Segmenter
from pipeline.shard_attempts import ActorUse

logger = logging.getLogger(__name__)


class _Batch(NamedTuple):
    images: Sequence[Pixels]
    sizes: Sequence[ImageSize]

    def part(self, start: int, count: int) -> _Batch:
        return _Batch(self.images[start : start + count], self.sizes[start : start + count])


class ModelThread:
    """Loads a segmenter and runs its ``detect`` on one thread, its ``encode`` on another. Errors of loading pass."""

    def __init__(self, load_segmenter: Callable[[], Segmenter], score_threshold: float) -> None:
        self._busy_seconds = 0.0
        self._num_halvings = 0
        self._score_threshold = score_threshold
        self._max_batch: dict[ImageSize, int] = {}
        self._queue: PriorityQueue[tuple[int, int, _Batch, Future[list[Detections]]]] = PriorityQueue()
        self._sequence = itertools.count()
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="encode")
        loaded: Future[Segmenter] = Future()
        threading.Thread(target=self._run, args=(load_segmenter, loaded), name="model", daemon=True).start()
        self.segmenter = loaded.result()

    def submit(
        self, urgency: int, images: Sequence[Pixels], sizes: Sequence[ImageSize] | None = None
    ) -> Future[list[Detections]]:
        """Queue one batch of one padded size. A lower ``urgency`` goes first, then the order of arrival. `sizes` are
        those of the images where the pixels are smaller versions."""
        future: Future[list[Detections]] = Future()
        self._queue.put((urgency, next(self._sequence), _Batch(images, sizes or sizes_of(images)), future))
        return future

    def use(self) -> ActorUse:
        """So far."""
        return ActorUse(
            actor=f"{socket.gethostname()}:{os.getpid()}",
            batch_size=self.segmenter.batch_size,
            halvings=self._num_halvings,
            peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            busy_seconds=self._busy_seconds,
            storage_retries=storage.retry_count(),
        )

    def _run(self, load_segmenter: Callable[[], Segmenter], loaded: Future[Segmenter]) -> None:
        self._encoders.submit(_compute_on_one_core).result()  # before load sets what this thread may use
        try:
            loaded.set_result(load_segmenter())
        except BaseException as error:  # it belongs to whoever waits for the model
            loaded.set_exception(error)
            return
        while True:
            _, _, batch, future = self._queue.get()
            started = time.perf_counter()
            try:
                parts = self._detect(batch)
            except BaseException as error:  # it belongs to whoever waits for the batch
                future.set_exception(error)
            else:
                self._encoders.submit(self._encode, parts, future)
            self._busy_seconds += time.perf_counter() - started

    def _detect(self, batch: _Batch) -> list[Any]:
        """Detect in as few parts as device memory allows, remembering how many that were for this size."""
        num_images = len(batch.images)
        size = self.segmenter.padded_size(batch.sizes[0])
        limit = self._max_batch.get(size, num_images)
        if num_images > limit:
            return [part for start in range(0, num_images, limit) for part in self._detect(batch.part(start, limit))]
        try:
            return [self.segmenter.detect(batch.images, self._score_threshold, sizes=batch.sizes)]
        except torch.OutOfMemoryError:
            if num_images == 1:
                raise
        self._max_batch[size] = num_images // 2
        self._num_halvings += 1
        logger.warning("out of device memory, batch halved size=%s images=%d", size, num_images // 2)
        torch.cuda.empty_cache()
        return self._detect(batch)

    def _encode(self, parts: list[Any], future: Future[list[Detections]]) -> None:
        try:
            found = [self.segmenter.encode(part, self._score_threshold) for part in parts]
        except BaseException as error:  # as above
            future.set_exception(error)
        else:
            future.set_result([detections for part in found for detections in part])


def _compute_on_one_core() -> None:
    """For the calling thread alone. Torch gives a thread the process's number when it is first asked, not before."""
    torch.get_num_threads()
    torch.set_num_threads(1)

"""Work done ahead by threads, its answers handed out in order, with bounded memory.

``in_order``: pairs of an expected size and a function enter; the functions' answers leave. ``Ahead``: an iterator
enters; its elements leave, some of them produced before they are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import Full, Queue
from threading import Event
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD_CHUNK = 512
AHEAD_CHUNKS = 16
"""Elements handed over at a time, and how many such chunks an ``Ahead`` may hold."""


def in_order(calls: Iterable[tuple[int, Callable[[], T]]], threads: int, max_bytes: int) -> Iterator[T]:
    """At most ``2 * threads`` answers and, beyond the first, ``max_bytes`` of them wait at any time."""
    if threads <= 1:
        for _, call in calls:
            yield call()
        return
    pending: deque[tuple[int, Future[T]]] = deque()
    waiting_bytes = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        try:
            for size, call in calls:
                while pending and (len(pending) >= 2 * threads or waiting_bytes + size > max_bytes):
                    done_size, done = pending.popleft()
                    waiting_bytes -= done_size
                    yield done.result()
                pending.append((size, pool.submit(call)))
                waiting_bytes += size
            while pending:
                yield pending.popleft()[1].result()
        finally:
            for _, future in pending:
                future.cancel()


class Ahead(Generic[T]):
    """An iterator that a thread of ``pool`` runs ahead of its reader. An error is raised in its place."""

    def __init__(self, pool: ThreadPoolExecutor, source: Iterable[T]) -> None:
        self._chunks: Queue[list[T]] = Queue(AHEAD_CHUNKS)
        self._stopped = Event()
        self._run = pool.submit(self._produce, iter(source))

    def __iter__(self) -> Iterator[T]:
        while chunk := self._chunks.get():
            yield from chunk
        self._run.result()

    def stop(self) -> None:
        """Produce no more; for a reader that gives up."""
        self._stopped.set()
        self._run.cancel()

    def _produce(self, source: Iterator[T]) -> None:
        try:
            while (chunk := list(islice(source, AHEAD_CHUNK))) and self._put(chunk):
                pass
        finally:
            self._put([])

    def _put(self, chunk: list[T]) -> bool:
        while not self._stopped.is_set():
            try:
                self._chunks.put(chunk, timeout=0.1)
            except Full:
                continue
            return True
        return False

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


def in_order(
    calls: Iterable[tuple[int, Callable[[], T]]], threads: int, max_bytes: int, *, per_task: int = 1
) -> Iterator[T]:
    """Answers of calls that threads of their own make ahead, in order.

    At most ``2 * threads`` tasks and, beyond the first, ``max_bytes`` of answers wait at any time.
    """
    if threads <= 1:
        for _, call in calls:
            yield call()
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        yield from on_pool(calls, pool, 2 * threads * per_task, max_bytes, per_task=per_task)


def on_pool(
    calls: Iterable[tuple[int, Callable[[], T]]],
    pool: ThreadPoolExecutor,
    max_waiting: int,
    max_bytes: int,
    *,
    per_task: int = 1,
) -> Iterator[T]:
    """Answers of calls that a pool makes ahead, in order; at most ``max_waiting``, and ``max_bytes``, of them wait.

    A thread makes ``per_task`` calls in a row: handing over costs about as much as reading a small file.
    """
    pending: deque[tuple[int, int, Future[list[T]]]] = deque()
    waiting = waiting_bytes = 0
    try:
        for size, task in _tasks(calls, per_task, max_bytes // 16):
            while pending and (waiting + len(task) > max_waiting or waiting_bytes + size > max_bytes):
                count, num_bytes, done = pending.popleft()
                waiting, waiting_bytes = waiting - count, waiting_bytes - num_bytes
                yield from done.result()
            pending.append((len(task), size, pool.submit(_call_all, task)))
            waiting, waiting_bytes = waiting + len(task), waiting_bytes + size
        while pending:
            yield from pending.popleft()[2].result()
    finally:
        for _, _, future in pending:
            future.cancel()


def _tasks(
    calls: Iterable[tuple[int, Callable[[], T]]], per_task: int, max_bytes: int
) -> Iterator[tuple[int, list[Callable[[], T]]]]:
    task: list[Callable[[], T]] = []
    total = 0
    for size, call in calls:
        task.append(call)
        total += size
        if len(task) == per_task or total >= max_bytes:
            yield total, task
            task, total = [], 0
    if task:
        yield total, task


def _call_all(task: list[Callable[[], T]]) -> list[T]:
    return [call() for call in task]


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

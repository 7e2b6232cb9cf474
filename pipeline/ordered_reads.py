"""Calls made ahead by threads, answers handed out in order, with bounded memory.

Pairs of an expected size and a function enter; the functions' answers leave, in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


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

"""Work done ahead: order, bounds, errors in their place, and no thread left behind."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from pipeline.ordered_reads import AHEAD_CHUNK, AHEAD_CHUNKS, Ahead, in_order, on_pool


def test_calls_made_ahead_keep_their_order_and_their_bounds() -> None:
    lock = threading.Lock()
    state = {"waiting": 0, "most": 0}

    def call(index: int) -> int:
        time.sleep(0.001 * (index % 3))
        with lock:
            state["waiting"] += 10
            state["most"] = max(state["most"], state["waiting"])
        return index

    seen = []
    for answer in in_order(((10, partial(call, index)) for index in range(200)), threads=4, max_bytes=50):
        with lock:
            state["waiting"] -= 10
        seen.append(answer)
    assert seen == list(range(200))
    assert state["most"] <= 60  # max_bytes, and the one being handed out


def test_several_calls_in_a_row_on_one_thread_change_nothing_else() -> None:
    calls = [(index % 7, partial(int, index)) for index in range(101)]
    with ThreadPoolExecutor(3) as pool:
        assert list(on_pool(iter(calls), pool, 12, 40, per_task=4)) == list(range(101))
        assert list(on_pool(iter([]), pool, 12, 40, per_task=4)) == []


def test_a_failing_call_is_raised_in_its_turn() -> None:
    def fail() -> int:
        raise OSError("store")

    answers = in_order([(1, lambda: 1), (1, fail), (1, lambda: 3)], threads=2, max_bytes=100)
    assert next(answers) == 1
    with pytest.raises(OSError, match="store"):
        next(answers)


def test_ahead_keeps_the_order_and_raises_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield from range(3 * AHEAD_CHUNK + 7)
        raise OSError("store")

    with ThreadPoolExecutor(1) as pool:
        elements = iter(Ahead(pool, source()))
        whole = 3 * AHEAD_CHUNK  # the chunk in which the source fails is not handed over
        assert list(itertools.islice(elements, whole)) == list(range(whole))
        with pytest.raises(OSError, match="store"):
            next(elements)


def test_ahead_waits_for_its_reader_and_stops_when_told() -> None:
    produced = itertools.count()

    def source() -> Iterator[int]:
        while True:
            yield next(produced)

    with ThreadPoolExecutor(1) as pool:
        ahead = Ahead(pool, source())
        assert next(iter(ahead)) == 0
        time.sleep(0.3)
        assert next(produced) <= (AHEAD_CHUNKS + 2) * AHEAD_CHUNK
        ahead.stop()

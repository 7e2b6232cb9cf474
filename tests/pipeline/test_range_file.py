"""Range reads: merging, and a remote object as a file."""

from __future__ import annotations

import io
import random
import threading
import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.ordered_reads import in_order
from pipeline.range_file import MERGE_GAP_BYTES, MERGED_BYTES, RangeFile, group_spans, merge_spans
from pipeline.storage import join

SPANS = st.lists(
    st.tuples(st.integers(0, 10**8), st.integers(0, 10**7)).map(lambda pair: (pair[0], sum(pair))), max_size=40
)


@given(SPANS)
def test_merged_spans_cover_every_span_in_order(spans: list[tuple[int, int]]) -> None:
    groups = group_spans(spans)
    assert [index for group in groups for index in group] == list(range(len(spans)))
    for group, (start, stop) in zip(groups, merge_spans(spans), strict=True):
        assert all(start <= spans[index][0] <= spans[index][1] <= stop for index in group)
        assert len(group) == 1 or stop - start <= MERGED_BYTES


def test_spans_merge_up_to_a_gap_and_a_size() -> None:
    gap = MERGE_GAP_BYTES
    assert merge_spans([(0, 10), (10 + gap, 20 + gap)]) == [(0, 20 + gap)]
    assert merge_spans([(0, 10), (11 + gap, 20 + gap)]) == [(0, 10), (11 + gap, 20 + gap)]
    assert merge_spans([(0, 10), (10, MERGED_BYTES), (MERGED_BYTES, MERGED_BYTES + 1)])[0] == (0, MERGED_BYTES)
    assert merge_spans([(50, 60), (0, 10)]) == [(50, 60), (0, 10)]
    assert merge_spans([]) == []


@pytest.mark.parametrize("planned", [False, True])
def test_a_range_file_reads_as_a_file(memory_root: str, planned: bool) -> None:
    content = random.Random(7).randbytes(10_000)
    uri = join(memory_root, "x")
    storage.write_bytes(uri, content)
    file, expected = RangeFile(uri, len(content), 100), io.BytesIO(content)
    if planned:
        file.plan([(0, 3000), (5000, 5001), (9000, 10_000)])
    steps = random.Random(8)
    for _ in range(500):
        whence, offset = steps.choice(
            [(0, steps.randrange(11_000)), (1, steps.randrange(50)), (2, -steps.randrange(10_000))]
        )
        assert file.seek(offset, whence) == expected.seek(offset, whence)
        size = steps.choice([0, 1, 7, 100, 101, 2500])
        assert file.read(size) == expected.read(size)
        assert file.tell() == expected.tell()
    file.seek(0)
    assert file.read() == content
    with pytest.raises(OSError, match="before the start"):
        file.seek(-1)


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


def test_a_failing_call_is_raised_in_its_turn() -> None:
    def fail() -> int:
        raise OSError("store")

    answers = in_order([(1, lambda: 1), (1, fail), (1, lambda: 3)], threads=2, max_bytes=100)
    assert next(answers) == 1
    with pytest.raises(OSError, match="store"):
        next(answers)

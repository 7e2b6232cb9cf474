"""Range reads: merging, and a remote object as a file."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
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

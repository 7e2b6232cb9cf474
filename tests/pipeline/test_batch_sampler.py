"""The order of training: against a loop with buffers, at any start, and shared among workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import batch_sampler
from pipeline.batch_sampler import Sample, batches, share, steps_in_epochs
from pipeline.errors import ConfigError

Sizes = NDArray[np.int64]

LANDSCAPE, PORTRAIT, SQUARE = (480, 640), (640, 480), (500, 500)
SHAPES = st.lists(st.sampled_from([LANDSCAPE, PORTRAIT, SQUARE]), min_size=1, max_size=25)


def stream_by_loop(sizes: Sizes, batch_size: int, seed: int) -> Iterator[list[Sample]]:
    """One image after another into the buffer of its group."""
    buffers: dict[bool, list[Sample]] = {True: [], False: []}
    epoch = 0
    while True:
        for index in np.random.default_rng([seed, epoch]).permutation(len(sizes)).tolist():
            height, width = sizes[index]
            buffer = buffers[bool(width >= height)]
            buffer.append(Sample(epoch, index))
            if len(buffer) == batch_size:
                yield list(buffer)
                buffer.clear()
        epoch += 1


def first(stream: Iterator[list[Sample]], count: int) -> list[list[Sample]]:
    return list(islice(stream, count))


@given(shapes=SHAPES, batch_size=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_the_stream_is_that_of_a_loop_with_two_buffers(
    shapes: list[tuple[int, int]], batch_size: int, seed: int
) -> None:
    sizes = np.array(shapes)
    found = first(batches(sizes, batch_size=batch_size, seed=seed), 20)
    assert found == first(stream_by_loop(sizes, batch_size, seed), 20)


@given(shapes=SHAPES, batch_size=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_each_image_comes_once_in_an_epoch(shapes: list[tuple[int, int]], batch_size: int, seed: int) -> None:
    sizes = np.array(shapes)
    stream = batches(sizes, batch_size=batch_size, seed=seed)
    samples = [sample for batch in first(stream, 3 * len(sizes) // batch_size + 1) for sample in batch]
    counts = Counter(samples)
    assert set(counts.values()) == {1}
    landscape = sizes[:, 1] >= sizes[:, 0]
    for members in (np.flatnonzero(landscape), np.flatnonzero(~landscape)):
        # A group's samples come epoch after epoch, so all but the last, unfinished one must be complete.
        of_group = [sample for sample in samples if sample.index in members]
        complete = len(of_group) // max(1, len(members))  # epochs
        expected = Counter(Sample(epoch, int(index)) for epoch in range(complete) for index in members)
        assert Counter(of_group[: complete * len(members)]) == expected  # none is skipped or comes too early


@given(shapes=SHAPES, batch_size=st.integers(1, 12), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_batch_holds_one_group_and_is_full(shapes: list[tuple[int, int]], batch_size: int, seed: int) -> None:
    sizes = np.array(shapes)
    for batch in first(batches(sizes, batch_size=batch_size, seed=seed), 12):
        assert len(batch) == batch_size
        assert len({bool(sizes[index, 1] >= sizes[index, 0]) for _, index in batch}) == 1


@given(shapes=SHAPES, batch_size=st.integers(1, 60), seed=st.integers(0, 99), start=st.integers(0, 40))
@settings(deadline=None)
def test_begun_later_it_is_the_rest_of_the_stream(
    shapes: list[tuple[int, int]], batch_size: int, seed: int, start: int
) -> None:
    sizes = np.array(shapes)
    whole = first(batches(sizes, batch_size=batch_size, seed=seed), start + 8)
    assert first(batches(sizes, batch_size=batch_size, seed=seed, start=start), 8) == whole[start:]


def test_leaving_out_a_hundred_epochs_draws_only_the_orders_that_still_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def watched(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
        drawn.append(epoch)
        return np.random.default_rng([seed, epoch]).permutation(num_images)

    monkeypatch.setattr(batch_sampler, "_order", watched)
    sizes = np.tile(np.array([LANDSCAPE, LANDSCAPE, LANDSCAPE, PORTRAIT]), (29_500, 1))  # 118,000 images
    batch = next(batches(sizes, batch_size=16, seed=1, start=100 * 118_000 // 16))
    assert len(batch) == 16
    assert set(drawn) <= {99, 100}
    assert {epoch for epoch, _ in batch} <= {99, 100}


def test_what_is_left_of_a_group_waits_for_the_next_epoch() -> None:
    """Three landscapes and one portrait, two at a time: by hand, from the orders of the epochs."""
    sizes = np.array([LANDSCAPE, LANDSCAPE, LANDSCAPE, PORTRAIT])
    found = first(batches(sizes, batch_size=2, seed=5), 4)  # two epochs of four images are four batches
    orders = [[int(i) for i in np.random.default_rng([5, epoch]).permutation(4)] for epoch in (0, 1)]
    a, b, c = (index for index in orders[0] if index < 3)
    d, e, f = (index for index in orders[1] if index < 3)
    landscapes = [[(0, a), (0, b)], [(0, c), (1, d)], [(1, e), (1, f)]]
    assert [batch for batch in found if batch[0].index < 3] == landscapes
    assert [batch for batch in found if batch[0].index == 3] == [[(0, 3), (1, 3)]]
    assert found[0] == landscapes[0]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    sizes = np.full((50, 2), 100)
    one, same, other = (first(batches(sizes, batch_size=50, seed=seed), 2) for seed in (3, 3, 4))
    assert one == same
    orders = [tuple(index for _, index in batch) for batch in one + other]
    assert len(set(orders)) == 4


def test_one_image_comes_in_every_epoch() -> None:
    found = first(batches(np.array([LANDSCAPE]), batch_size=3, seed=0, start=2), 2)
    assert found == [[(6, 0), (7, 0), (8, 0)], [(9, 0), (10, 0), (11, 0)]]


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    found = first(batches(np.array([SQUARE, LANDSCAPE]), batch_size=5, seed=0), 2)
    assert sorted(sample for batch in found for sample in batch) == [(e, i) for e in range(5) for i in range(2)]
    assert [sample.epoch for sample in found[0]] == [0, 0, 1, 1, 2]


@given(num_samples=st.integers(1, 40), num_workers=st.integers(1, 40))
def test_shares_are_the_batch_in_order_and_even(num_samples: int, num_workers: int) -> None:
    batch = [Sample(0, index) for index in range(num_samples)]
    if num_samples < num_workers:
        with pytest.raises(ConfigError, match=f"batch of {num_samples} leaves some of {num_workers} workers"):
            share(batch, 0, num_workers)
        return
    shares = [share(batch, rank, num_workers) for rank in range(num_workers)]
    assert [sample for one in shares for sample in one] == batch
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_lies_among_the_workers(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank must be from 0 to 1, got {rank}"):
        share([Sample(0, 0), Sample(0, 1)], rank, 2)


def test_steps_are_rounded_up() -> None:
    assert steps_in_epochs(16, 3, 16) == 3
    assert steps_in_epochs(17, 1, 16) == 2
    assert steps_in_epochs(100, 0.5, 16) == 4  # 50 images: 3.125 batches
    assert steps_in_epochs(10, 1.1, 11) == 1  # 10 · 1.1 is a little more than 11 in floating point
    assert steps_in_epochs(10, 0, 11) == 0


@pytest.mark.parametrize(
    ("name", "sizes", "batch_size", "seed", "start"),
    [
        ("batch_size", [LANDSCAPE], 0, 0, 0),
        ("seed", [LANDSCAPE], 1, -1, 0),
        ("start", [LANDSCAPE], 1, 0, -1),
        ("sizes", np.zeros((0, 2)), 1, 0, 0),
        ("sizes", [[1, 2, 3]], 1, 0, 0),
    ],
)
def test_a_wrong_request_is_refused_before_the_first_batch(
    name: str, sizes: Sizes, batch_size: int, seed: int, start: int
) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        batches(np.array(sizes), batch_size=batch_size, seed=seed, start=start)


@pytest.mark.parametrize(
    ("name", "num_images", "epochs", "batch_size"),
    [("num_images", 0, 1.0, 1), ("epochs", 1, float("inf"), 1), ("epochs", 1, -0.5, 1), ("batch_size", 1, 1.0, 0)],
)
def test_steps_of_nothing_are_refused(name: str, num_images: int, epochs: float, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        steps_in_epochs(num_images, epochs, batch_size)

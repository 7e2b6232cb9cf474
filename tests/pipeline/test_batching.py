from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.structures import ImageSize
from pipeline.batching import DecodedImage, batches


def image(index: int, side: int) -> DecodedImage:
    pixels = np.zeros((side, side, 3), np.uint8)
    return DecodedImage(index=index, pixels=pixels, size=ImageSize(side, side), orientation=1, num_bytes=1)


def shape(one: DecodedImage) -> int:
    return int(one.pixels.shape[0])


@given(
    sides=st.lists(st.integers(1, 5), max_size=40),
    batch_size=st.integers(1, 6),
    max_waiting_bytes=st.integers(0, 400),
)
def test_every_image_leaves_once_in_a_batch_of_its_shape(
    sides: list[int], batch_size: int, max_waiting_bytes: int
) -> None:
    images = [image(index, side) for index, side in enumerate(sides)]
    found = list(batches(images, batch_size=batch_size, shape_of=shape, max_waiting_bytes=max_waiting_bytes))
    assert Counter(one.index for batch in found for one in batch) == Counter(range(len(sides)))
    for batch in found:
        assert 1 <= len(batch) <= batch_size
        assert len({shape(one) for one in batch}) == 1
        assert [one.index for one in batch] == sorted(one.index for one in batch)


def test_a_group_leaves_as_soon_as_it_is_full() -> None:
    taken = []

    def source() -> list[DecodedImage]:
        return [image(0, 1), image(1, 2), image(2, 1), image(3, 2)]

    def watched() -> object:
        for one in source():
            taken.append(one.index)
            yield one

    first = next(batches(watched(), batch_size=2, shape_of=shape, max_waiting_bytes=10**9))  # type: ignore[arg-type]
    assert [one.index for one in first] == [0, 2]
    assert taken == [0, 1, 2]


def test_what_waits_is_bounded_by_the_largest_group_leaving_early() -> None:
    images = [image(0, 2), image(1, 3), image(2, 2)]  # 12, 27 and 12 bytes
    found = batches(images, batch_size=3, shape_of=shape, max_waiting_bytes=40)
    assert [[one.index for one in batch] for batch in found] == [[1], [0, 2]]

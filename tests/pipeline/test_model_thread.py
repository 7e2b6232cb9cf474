from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model.structures import Detections, ImageSize
from pipeline.model_thread import ModelThread
from pipeline.segmenter import Pixels
from tests.reference.tiny_segmenter import TinySegmenter


def images(count: int, side: int = 4) -> list[Pixels]:
    return [np.full((side, side, 3), index, np.uint8) for index in range(count)]


class Cramped(TinySegmenter):
    """Has memory for so many images at once."""

    room = 2
    sizes: list[int] = []  # noqa: RUF012 - of this class alone

    def detect(
        self, images: Sequence[Pixels], score_threshold: float, *, sizes: Sequence[ImageSize]
    ) -> Sequence[Pixels]:
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("no room")
        return images


def test_out_of_memory_halves_the_batch_keeps_the_order_and_is_remembered() -> None:
    Cramped.sizes = []
    thread = ModelThread(Cramped, 0.5)
    found = thread.submit(0, images(7)).result()
    assert [round(one.scores[0] * 255) if len(one) else None for one in found] == [None] * 7
    assert len(found) == 7
    use = thread.use()
    assert (use.halvings, use.batch_size) == (2, Cramped.batch_size)
    assert use.busy_seconds > 0
    assert Cramped.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]  # 7 → 3 → 1
    Cramped.sizes = []
    thread.submit(0, images(3)).result()
    assert Cramped.sizes == [1, 1, 1]
    thread.submit(0, images(2, side=9)).result()  # another size has its own bound
    assert Cramped.sizes[-1] == 2


def test_one_image_that_does_not_fit_is_an_error_for_who_waits() -> None:
    class Full(TinySegmenter):
        def detect(
            self, images: Sequence[Pixels], score_threshold: float, *, sizes: Sequence[ImageSize]
        ) -> Sequence[Pixels]:
            raise torch.OutOfMemoryError("no room")

    thread = ModelThread(Full, 0.5)
    with pytest.raises(torch.OutOfMemoryError):
        thread.submit(0, images(2)).result()


def test_an_error_in_encode_reaches_who_waits_and_the_thread_lives_on() -> None:
    class Fails(TinySegmenter):
        def encode(self, raw: Any, score_threshold: float) -> list[Detections]:
            if len(raw) == 1:
                raise ValueError("one")
            return super().encode(raw, score_threshold)

    thread = ModelThread(Fails, 0.5)
    with pytest.raises(ValueError, match="one"):
        thread.submit(0, images(1)).result()
    assert len(thread.submit(0, images(2)).result()) == 2


def test_the_earlier_shard_has_the_model_first() -> None:
    gate = threading.Event()
    order: list[int] = []

    class Gated(TinySegmenter):
        def detect(
            self, images: Sequence[Pixels], score_threshold: float, *, sizes: Sequence[ImageSize]
        ) -> Sequence[Pixels]:
            gate.wait()
            order.append(int(images[0][0, 0, 0]))
            return images

        def padded_size(self, size: ImageSize) -> ImageSize:
            return size

    thread = ModelThread(Gated, 0.5)
    marked = [np.full((2, 2, 3), mark, np.uint8) for mark in range(5)]
    first = thread.submit(9, [marked[0]])  # taken at once, waits at the gate
    while not thread._queue.empty():
        pass
    later = [thread.submit(urgency, [marked[mark]]) for mark, urgency in ((1, 2), (2, 1), (3, 2), (4, 1))]
    gate.set()
    for future in (first, *later):
        future.result()
    assert order == [0, 2, 4, 1, 3]


def test_the_model_computes_on_the_threads_its_loading_chose_and_encoding_on_one() -> None:
    seen: dict[str, tuple[str, int]] = {}

    def note(name: str) -> None:
        seen[name] = (threading.current_thread().name.split("_")[0], torch.get_num_threads())

    class Notes(TinySegmenter):
        def __init__(self) -> None:
            torch.set_num_threads(3)
            note("load")

        def detect(
            self, images: Sequence[Pixels], score_threshold: float, *, sizes: Sequence[ImageSize]
        ) -> Sequence[Pixels]:
            note("detect")
            return images

        def encode(self, raw: Any, score_threshold: float) -> list[Detections]:
            note("encode")
            return super().encode(raw, score_threshold)

    before = torch.get_num_threads()
    ModelThread(Notes, 0.5).submit(0, images(1)).result()
    torch.set_num_threads(before)
    assert seen == {"load": ("model", 3), "detect": ("model", 3), "encode": ("encode", 1)}


def test_an_error_of_loading_reaches_who_waits_for_the_model() -> None:
    def load() -> TinySegmenter:
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        ModelThread(load, 0.5)

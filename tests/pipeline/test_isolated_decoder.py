from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline import decode
from pipeline.decode import DecodeLimits
from pipeline.errors import DecodeError
from pipeline.isolated_decoder import IsolatedDecoder
from tests.pipeline.poison import HANGS, KILLS, decode_poisoned
from tests.reference import processes

LIMITS = DecodeLimits(max_image_pixels=10_000)


def png(side: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_pixels_and_reasons_cross_the_pipe_and_a_dead_or_late_child_costs_one_image() -> None:
    with IsolatedDecoder(decode_poisoned, LIMITS, timeout_seconds=2.0) as child:
        pixels, orientation = child.decode(png())
        assert np.array_equal(pixels, decode.decode(png(), decode.inspect(png(), LIMITS)))
        assert orientation == 1
        for data, reason in (
            (b"", "empty"),
            (b"not an image", "unreadable"),
            (png(200), "too_large"),
            (png() + KILLS, "killed_worker"),
            (png() + HANGS, "timeout"),
        ):
            with pytest.raises(DecodeError) as caught:
                child.decode(data)
            assert caught.value.reason == reason
            assert np.array_equal(child.decode(png())[0], pixels)
    assert not processes.named("pipeline.isolated_decoder")

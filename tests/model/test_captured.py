"""Graphs on a GPU: replayed with other images, filled up, in turn, and where their room is short."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import model
from model import Detections, MaskRCNN, fixed_forward, raw_detections
from model.structures import ImageSize, sizes_of
from tests.model.conftest import drawn_image
from tests.model.test_mask_rcnn import _between

pytestmark = pytest.mark.gpu

SHAPES = [(90, 120), (96, 128), (120, 90), (93, 125), (128, 96), (90, 121), (95, 127)]


@pytest.fixture
def net() -> MaskRCNN:
    """R18-FPN with random weights in float32, without TF32."""
    config = replace(model.R18_half_FPN(num_classes=4), min_size=96, max_size=160)
    random = model.random_network(config, seed=1, image=drawn_image(90, 120))
    parts = {name: getattr(random, name) for name in ("config", "recipe", "categories", "name", "sha256")}
    return MaskRCNN(random.network, **parts, device="cuda")


def _by_any_shapes(net: MaskRCNN, images: list[model.mask_rcnn.Pixels]) -> list[Detections]:
    return [
        found
        for image in images
        for found in raw_detections.encode(
            net._detect([image], sizes_of([image]), 0.05), 0.05, recipe=net.recipe, categories=net.categories
        )
    ]


def _assert_equal(found: list[Detections], expected: list[Detections]) -> None:
    for one, other in zip(found, expected, strict=True):
        difference = _between(one, other)
        assert (difference.count, difference.unmatched) == (0, 0)


def test_each_replay_is_of_its_own_images(net: MaskRCNN) -> None:
    # Shapes come three times: run as they are, captured, replayed; batches of 3 are filled up to 4.
    net.batch_size = 3
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for seed in range(3):
            images = [drawn_image(*shape, seed=10 * seed + index) for index, shape in enumerate(SHAPES)]
            _assert_equal(net.predict(images, 0.05), _by_any_shapes(net, images))
    assert net.num_repeated == 0
    assert len({net.padded_size(ImageSize(*shape)) for shape in SHAPES}) > 1


def test_what_finds_no_room_is_done_again(net: MaskRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_forward, "TEXT_PER_IMAGE", 10)
    images = [drawn_image(*shape, seed=index) for index, shape in enumerate(SHAPES[:2])]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        _assert_equal(net.predict(images, 0.05), _by_any_shapes(net, images))
    assert net.num_repeated > 0


def test_nothing_found_is_an_empty_answer(net: MaskRCNN) -> None:
    assert [len(found) for found in net.predict([drawn_image(90, 120)] * 2, 1.0)] == [0, 0]

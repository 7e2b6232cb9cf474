from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from model.recipe import Recipe
from model.structures import ImageSize
from model.transform import padded_size, resized_size, to_input
from tests.model.conftest import drawn_image

RECIPE = Recipe()


def _input(image: NDArray[np.uint8], size: ImageSize, padded: ImageSize, recipe: Recipe = RECIPE) -> Tensor:
    return to_input([image], [size], padded=padded, recipe=recipe, device=torch.device("cpu"))[0]


@pytest.mark.parametrize(
    ("given_size", "expected"),
    [
        ((480, 640), (800, 1066)),  # 640 · 800/480 = 1066.7, rounded down
        ((640, 480), (1066, 800)),
        ((100, 1000), (133, 1333)),  # the long side binds: 100 · 1.333 = 133.3
        ((800, 1333), (800, 1333)),
        ((1, 5000), (1, 1333)),  # 0.27 would leave nothing
    ],
)
def test_resized_size_by_hand(given_size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(ImageSize(*given_size), min_size=800, max_size=1333) == expected


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_padding_is_the_least_multiple(height: int, width: int) -> None:
    padded = padded_size(ImageSize(height, width), divisor=32)
    for side, whole in zip((height, width), padded, strict=True):
        assert whole % 32 == 0
        assert 0 <= whole - side < 32


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (37, 90), (200, 30)])
def test_input_is_torchvisions(shape: tuple[int, int]) -> None:
    image = drawn_image(*shape)
    size = resized_size(ImageSize(*shape), min_size=96, max_size=200)
    ours = _input(image, size, padded_size(size, divisor=32))
    transform = GeneralizedRCNNTransform(96, 200, list(RECIPE.pixel_mean), list(RECIPE.pixel_std)).eval()
    theirs, _ = transform([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    assert theirs.image_sizes == [size]
    torch.testing.assert_close(ours, theirs.tensors[0], rtol=0, atol=1e-5)


def test_one_colour_by_hand_and_zeros_around_it() -> None:
    image = np.full((2, 3, 3), (255, 0, 51), dtype=np.uint8)
    pixels = _input(image, ImageSize(4, 6), ImageSize(32, 32))
    colour = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    expected = torch.tensor(colour)[:, None, None].expand(3, 4, 6)
    torch.testing.assert_close(pixels[:, :4, :6], expected)
    assert not pixels[:, 4:].any()
    assert not pixels[:, :, 6:].any()


def test_bgr_turns_the_channels_round() -> None:
    image = drawn_image(8, 8)
    size = ImageSize(8, 8)
    plain = replace(RECIPE, pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0), pixel_range=1.0)
    turned = _input(image, size, size, replace(plain, channel_order="BGR"))
    assert torch.equal(turned, torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float())


def test_any_memory_layout_will_do() -> None:
    image = drawn_image(40, 50)
    size, padded = ImageSize(40, 50), ImageSize(64, 64)
    expected = _input(image, size, padded)
    frozen = image.copy()
    frozen.setflags(write=False)
    flipped_twice = np.ascontiguousarray(image[::-1])[::-1]
    for same in (frozen, flipped_twice, np.asfortranarray(image)):
        assert torch.equal(_input(same, size, padded), expected)

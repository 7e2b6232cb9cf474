from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from model.pillow_resize import pillow_resize
from model.structures import ImageSize
from tests.model.conftest import coco_paths, drawn_image, read_image


@pytest.mark.parametrize("scale", [1.67, 1.0, 0.6, 0.31])
def test_equals_pillow_to_the_last_bit(scale: float) -> None:
    images = [read_image(path) for path in coco_paths()[:3]] or [drawn_image(120, 160), drawn_image(90, 70)]
    for image in images:
        size = ImageSize(round(image.shape[0] * scale), round(image.shape[1] * scale))
        expected = np.asarray(Image.fromarray(image).resize((size.width, size.height), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(pillow_resize(torch.from_numpy(image), size).numpy(), expected)


def test_twice_as_wide_by_hand() -> None:
    # the centres of the new pixels lie a quarter and three quarters between the old ones
    row = torch.tensor([0, 100], dtype=torch.uint8)[None, :, None].expand(1, 2, 3)
    assert pillow_resize(row, ImageSize(1, 4))[0, :, 0].tolist() == [0, 25, 75, 100]


def test_half_as_wide_by_hand() -> None:
    # a triangle four pixels wide: at 0.5 and 1.5 it is 3/4, at 2.5 1/4, and what reaches over the edge is left out
    row = torch.tensor([0, 70, 140, 210], dtype=torch.uint8)[None, :, None].expand(1, 4, 3)
    assert pillow_resize(row, ImageSize(1, 2))[0, :, 0].tolist() == [50, 160]


@pytest.mark.parametrize("size", [ImageSize(1, 1), ImageSize(1, 9), ImageSize(7, 1)])
def test_one_colour_stays_that_colour(size: ImageSize) -> None:
    for before in ((1, 1), (3, 5), (40, 2)):
        pixels = torch.full((*before, 3), 201, dtype=torch.uint8)
        resized = pillow_resize(pixels, size)
        assert resized.shape == (*size, 3)
        assert (resized == 201).all()

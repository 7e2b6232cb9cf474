"""Images and networks that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import model
from model import MaskRCNN, compiled_winograd

DATA = Path(os.environ.get("MASKLINE_DATA", Path(__file__).parents[3] / "shared" / "data"))


needs_compiled = pytest.mark.skipif(
    not compiled_winograd.can_compute(torch.nn.Conv2d(64, 64, 3, padding=1), in_integers=True),
    reason="winograd.c was not compiled, or not for this processor",
)


def conv_3x3(channels: int, outputs: int, *, bias: bool = True) -> torch.nn.Conv2d:
    """Whose outputs spread by one where its inputs do."""
    conv = torch.nn.Conv2d(channels, outputs, 3, padding=1, bias=bias)
    torch.nn.init.normal_(conv.weight, std=(9 * channels) ** -0.5)
    return conv.requires_grad_(False)


def convolve(x: torch.Tensor, conv: torch.nn.Conv2d) -> torch.Tensor:
    """The plain sum, in float64."""
    bias = None if conv.bias is None else conv.bias.double()
    return torch.nn.functional.conv2d(x.double(), conv.weight.double(), bias, padding=1)


def coco_paths() -> list[Path]:
    """The 100 images, or none where they are not."""
    return sorted((DATA / "coco100" / "images").glob("*.jpg"))


def read_image(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def drawn_image(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Textured rectangles on a gradient: something for every stage of a network to respond to."""
    generator = np.random.default_rng(seed)
    image = np.linspace(40, 200, width)[None, :, None] + np.linspace(-30, 30, height)[:, None, None]
    image = np.repeat(image, 3, axis=2)
    for _ in range(12):
        y, x = generator.integers(0, height), generator.integers(0, width)
        patch = image[y : y + generator.integers(1, height + 1), x : x + generator.integers(1, width + 1)]
        patch[:] = generator.integers(0, 256, 3) + generator.normal(0, 20, patch.shape)
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on cores that others use wait for each other: six times slower, measured on two busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_net() -> MaskRCNN:
    """R18-FPN with random weights; it finds something everywhere."""
    config = model.R18_FPN(num_classes=5, min_size=160, max_size=256)
    return model.random_network(config, seed=1, image=drawn_image(120, 160))

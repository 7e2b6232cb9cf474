from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import winograd
from model.conv_norm import ConvNorm
from model.winograd import can_transform, pays, transformed, winograd_conv


def _directly(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
    y = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    return y.relu() if relu else y


def _random(num_images: int, channels: int, outputs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(num_images, channels, height, width).to(memory_format=torch.channels_last)
    return x, torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5, torch.randn(outputs)


@settings(deadline=None, max_examples=60)
@given(
    num_images=st.integers(1, 5),
    channels=st.integers(1, 9),
    outputs=st.integers(1, 9),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    block_tiles=st.sampled_from([1, 7, 30, 1000]),
    relu=st.booleans(),
)
@torch.inference_mode()
def test_it_is_the_plain_sum(
    num_images: int, channels: int, outputs: int, height: int, width: int, block_tiles: int, relu: bool
) -> None:
    """Whatever the size, and however it is cut into blocks."""
    x, weight, bias = _random(num_images, channels, outputs, height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "BLOCK_TILES", block_tiles)
        found = winograd_conv(x, transformed(weight), bias, relu=relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), _directly(x, weight, bias, relu=relu), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_kernel_that_hands_on_its_centre_changes_nothing() -> None:
    x = torch.arange(2.0 * 3 * 9 * 6).view(2, 3, 9, 6).to(memory_format=torch.channels_last)
    weight = nn.init.dirac_(torch.empty(3, 3, 3, 3))
    found = winograd_conv(x, transformed(weight), torch.tensor([0.0, 1, -1000]), relu=True)
    expected = (x + torch.tensor([0.0, 1, -1000])[:, None, None]).relu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@torch.inference_mode()
def test_bfloat16_enters_and_float32_leaves_without_a_rounding() -> None:
    x, weight, bias = _random(1, 16, 8, 20, 30)
    x = x.bfloat16()
    found = winograd_conv(x, transformed(weight), bias, relu=False)
    torch.testing.assert_close(found.double(), _directly(x, weight, bias, relu=False), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_an_image_hangs_on_its_neighbours_by_rounding_alone() -> None:
    x, weight, bias = _random(40, 8, 8, 13, 9)
    together = winograd_conv(x, transformed(weight), bias, relu=False)
    x[1:] *= 100
    beside_others = winograd_conv(x, transformed(weight), bias, relu=False)
    torch.testing.assert_close(beside_others[:1], together[:1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(256, 256, 3, padding=1), True),
        (nn.Conv2d(256, 256, 3, padding=1, stride=2), False),
        (nn.Conv2d(256, 256, 3), False),
        (nn.Conv2d(256, 256, 1), False),
        (nn.Conv2d(256, 256, 3, padding=1, groups=2), False),
        (nn.Conv2d(256, 256, 3, padding=2, dilation=2), False),
        (nn.Conv2d(64, 64, 3, padding=1), False),
    ],
)
def test_what_it_stands_for(conv: nn.Conv2d, expected: bool) -> None:
    assert can_transform(conv) is expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 256, 200, 272), True),
        ((100, 256, 14, 14), True),
        ((1, 256, 14, 14), False),  # 16 tiles
        ((1000, 256, 7, 7), False),  # of whose 9 × 16 cells 49 are on the map
        ((0, 256, 14, 14), False),
    ],
)
def test_few_and_small_maps_are_left_to_the_plain_sum(shape: tuple[int, ...], expected: bool) -> None:
    assert pays(torch.Size(shape)) is expected


@torch.inference_mode()
def test_a_layer_that_has_it_is_the_layer() -> None:
    torch.manual_seed(0)
    layer = ConvNorm(8, 8, kernel_size=3)
    x = torch.randn(1, 8, 44, 52)
    small = x[:, :, :8, :8]
    expected, of_small = layer(x), layer(small)
    layer.winograd = transformed(layer.conv.weight)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    assert not torch.equal(layer(x), expected)  # by the other way, then
    assert torch.equal(layer(small), of_small)  # by the plain sum still

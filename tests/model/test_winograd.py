from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import winograd
from model.compiled_winograd import TILE as COMPILED_TILE
from model.conv_norm import ConvNorm
from model.fused_conv import onednn_conv
from model.winograd import POOLED_TILE, TILE, Winograd, can_transform, tile_of, transforms
from tests.model.conftest import conv_3x3, convolve


def _directly(x: Tensor, conv: nn.Conv2d, plus: Tensor | None = None, *, relu: bool = False) -> Tensor:
    y = convolve(x, conv) if plus is None else convolve(x, conv) + plus
    return y.relu() if relu else y


@pytest.mark.parametrize("tile", [COMPILED_TILE, TILE, POOLED_TILE])
def test_the_transforms_of_an_axis_filter_it(tile: int) -> None:
    torch.manual_seed(0)
    inputs, kernel = torch.randn(tile + 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    of_inputs, of_kernel, of_outputs = transforms(tile)
    found = of_outputs @ ((of_kernel @ kernel) * (of_inputs @ inputs))
    torch.testing.assert_close(found, inputs.unfold(0, 3, 1) @ kernel, rtol=0, atol=1e-11)


def test_the_smallest_transforms_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """F(2, 3) at 0, 1, -1 and infinity, up to the signs and scales that inputs and kernel share."""
    monkeypatch.setitem(winograd._POINTS, 2, (0, 1, -1))
    of_inputs, of_kernel, of_outputs = transforms(2)
    assert of_inputs.tolist() == [[-1, 0, 1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]
    assert of_kernel.tolist() == [[-1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    assert of_outputs.tolist() == [[1, 1, 1, 0], [0, 1, -1, 1]]


@settings(deadline=None, max_examples=100)
@given(
    num_images=st.integers(1, 5),
    channels=st.integers(1, 9),
    outputs=st.integers(1, 9),
    height=st.integers(1, 27) | st.sampled_from([7, 14]),
    width=st.integers(1, 27) | st.sampled_from([7, 14]),
    block_tiles=st.sampled_from([1, 7, 30, 1000]),
    relu=st.booleans(),
    bias=st.booleans(),
    adds=st.booleans(),
)
@torch.inference_mode()
def test_it_is_the_plain_sum(
    num_images: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    block_tiles: int,
    relu: bool,
    bias: bool,
    adds: bool,
) -> None:
    """Whatever the size, and however it is cut into blocks."""
    torch.manual_seed(0)
    conv = conv_3x3(channels, outputs, bias=bias)
    x = torch.randn(num_images, channels, height, width).to(memory_format=torch.channels_last)
    plus = torch.randn(num_images, outputs, height, width) if adds else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "BLOCK_TILES", block_tiles)
        patch.setattr(winograd, "MIN_TILES", 0)
        found = Winograd(conv)(x, plus, relu=relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), _directly(x, conv, plus, relu=relu), rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("tile", "shape", "expected"),
    [(TILE, (1, 53, 67), 4e-6), (POOLED_TILE, (9, 14, 14), 2e-5)],
)
@torch.inference_mode()
def test_it_rounds_no_more_than_is_said(tile: int, shape: tuple[int, int, int], expected: float) -> None:
    """The root mean square over outputs that spread by one, with the channels that pyramids have."""
    torch.manual_seed(0)
    conv, x = conv_3x3(256, 64), torch.randn(shape[0], 256, *shape[1:])
    assert tile_of(*shape[1:]) == tile
    error = (Winograd(conv)(x, None, relu=False) - _directly(x, conv)).square().mean().sqrt()
    assert expected / 2 < float(error) < expected * 1.5


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few and small the maps."""
    monkeypatch.setattr(winograd, "MIN_TILES", 0)


@pytest.mark.usefixtures("always")
@torch.inference_mode()
def test_a_kernel_that_hands_on_its_centre_changes_nothing() -> None:
    x = torch.arange(2.0 * 3 * 9 * 6).view(2, 3, 9, 6).to(memory_format=torch.channels_last)
    conv = conv_3x3(3, 3)
    nn.init.dirac_(conv.weight)
    conv.bias = nn.Parameter(torch.tensor([0.0, 1, -1000]))
    found = Winograd(conv)(x, None, relu=True)
    expected = (x + torch.tensor([0.0, 1, -1000])[:, None, None]).relu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("always")
@torch.inference_mode()
def test_bfloat16_enters_and_float32_leaves_without_a_rounding() -> None:
    torch.manual_seed(0)
    conv = conv_3x3(16, 8)
    x = torch.randn(1, 16, 20, 30).bfloat16()
    found = Winograd(conv)(x, None, relu=False)
    torch.testing.assert_close(found.double(), _directly(x, conv), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("always")
@torch.inference_mode()
def test_an_image_hangs_on_its_neighbours_by_rounding_alone() -> None:
    torch.manual_seed(0)
    conv, x = conv_3x3(8, 8), torch.randn(40, 8, 13, 9)
    together = Winograd(conv)(x, None, relu=False)
    x[1:] *= 100
    beside_others = Winograd(conv)(x, None, relu=False)
    torch.testing.assert_close(beside_others[:1], together[:1], rtol=0, atol=1e-3)


@pytest.mark.usefixtures("always")
@torch.inference_mode()
def test_maps_of_many_sizes_share_few_weights() -> None:
    """One set for each layout that oneDNN wants."""
    conv = conv_3x3(96, 96)
    layer = Winograd(conv)
    for width in range(8, 100, 6):
        layer(torch.randn(1, 96, 20, width), None, relu=False)
    assert len(layer._layouts) > len(layer._weights)
    assert len(layer._weights) <= 3


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(256, 256, 3, padding=1), True),
        (nn.Conv2d(128, 128, 3, padding=1), True),
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
        ((5, 256, 14, 14), True),  # 20 tiles of 7
        ((4, 256, 14, 14), False),
        ((1, 256, 24, 24), False),  # 16 tiles of 6
        ((0, 256, 14, 14), False),
    ],
)
def test_few_and_small_maps_are_left_to_the_plain_sum(shape: tuple[int, ...], expected: bool) -> None:
    assert Winograd(conv_3x3(1, 1)).pays(torch.Size(shape)) is expected


@torch.inference_mode()
def test_a_layer_that_has_it_is_the_layer() -> None:
    torch.manual_seed(0)
    layer = ConvNorm(8, 8, kernel_size=3)
    x, plus = torch.randn(1, 8, 44, 52), torch.randn(1, 8, 44, 52)
    expected, with_sum = layer(x), layer(x, plus)
    layer.winograd = Winograd(layer.conv)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(layer(x, plus), with_sum, rtol=0, atol=1e-4)
    assert not torch.equal(layer(x), expected)  # by the other way, then
    small = x[:, :, :8, :8].contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(small), onednn_conv(layer.conv, small, None, relu=True))  # by the plain sum still

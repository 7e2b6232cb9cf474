"""Winograd's form of a trained convolution against the plain sum's and torch's gradients of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import R18_FPN, winograd_in_training
from model.conv_norm import ConvNorm
from model.initial_weights import initialise
from model.network import build_network, ready_to_run
from model.recipe import Recipe
from model.training import TrainingForward
from model.winograd_in_training import convolve, pays
from tests.model.conftest import conv_3x3, needs_compiled

pytestmark = needs_compiled


@pytest.fixture(autouse=True)
def _without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with tiles of bfloat16 too, whose own sums are the faster."""
    monkeypatch.setattr(winograd_in_training, "has_bf16_tiles", lambda: False)


def gradients(maps: Tensor, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(maps, leaves, upstream))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(1, 3),
    channels=st.sampled_from([32, 64]),
    outputs=st.sampled_from([32, 96]),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    scale=st.sampled_from([1e-8, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_maps_and_gradients_are_the_plain_sums(
    seed: int, num_images: int, channels: int, outputs: int, height: int, width: int, scale: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    conv = conv_3x3(channels, outputs).requires_grad_()
    x = torch.randn(num_images, channels, height, width).to(dtype).requires_grad_()
    upstream = (torch.randn(num_images, outputs, height, width) * scale).to(dtype)
    assert conv.bias is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = convolve(x, conv.weight, conv.bias)
    assert found.dtype == dtype
    exact = [one.detach().double().requires_grad_() for one in (x, conv.weight, conv.bias)]
    expected = F.conv2d(exact[0], exact[1], exact[2], padding=1)
    pairs = zip(
        [found, *gradients(found, [x, conv.weight, conv.bias], upstream)],
        [expected, *gradients(expected, exact, upstream.double())],
        strict=True,
    )
    bound = 2e-5 if dtype == torch.float32 else 1e-2
    for ours, wanted in pairs:
        assert (ours.double() - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_asked_for(wanted: tuple[int, ...]) -> None:
    conv = conv_3x3(32, 32)
    inputs = [torch.randn(1, 32, 6, 7), conv.weight.detach(), torch.randn(32)]
    for place in wanted:
        inputs[place].requires_grad_()
    convolve(inputs[0], inputs[1], inputs[2]).sum().backward()  # type: ignore[no-untyped-call]
    assert [one.grad is not None for one in inputs] == [place in wanted for place in range(3)]


def test_small_and_other_maps_are_left_to_the_plain_sum() -> None:
    conv, x = conv_3x3(32, 32), torch.empty(1, 32, 80, 80)
    assert pays(conv, x, torch.float32)
    assert pays(conv_3x3(64, 64), torch.empty(1, 64, 80, 80), torch.bfloat16)
    assert not pays(conv, x, torch.bfloat16)  # few channels
    assert not pays(conv, x, torch.float64)
    assert not pays(conv, x[..., :49], torch.float32)  # 3,920 cells
    assert not pays(conv_3x3(32, 512), x, torch.float32)  # 6,400 cells for a large weight
    assert not pays(conv_3x3(48, 32), torch.empty(1, 48, 80, 80), torch.float32)  # backward it would have 48 outputs
    assert not pays(conv, x.to("meta"), torch.float32)


def test_tiles_of_bfloat16_are_faster_than_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd_in_training, "has_bf16_tiles", lambda: True)
    assert not pays(conv_3x3(64, 64), torch.empty(1, 64, 80, 80), torch.bfloat16)
    assert pays(conv_3x3(64, 64), torch.empty(1, 64, 80, 80), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_in_training_uses_it_with_its_norm_and_relu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEWEST_CELLS", "CELLS_PER_CHANNEL"):
        monkeypatch.setattr(winograd_in_training, name, 0)
    torch.manual_seed(0)
    part = ConvNorm(64, 64, kernel_size=3, norm=torch.nn.BatchNorm2d)
    x, plus = torch.randn(2, 64, 9, 11), torch.randn(2, 64, 9, 11)
    runs = []
    for part.trains_by_winograd in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = part(x, plus.clone())
        loss = (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        runs.append([y, *torch.autograd.grad(loss, list(part.parameters()))])
    for plain, found in zip(*runs, strict=True):
        assert plain.dtype == found.dtype
        assert not torch.equal(plain, found)  # it was used
        bound = 1e-4 if dtype == torch.float32 else 0.1  # some cells are on the other side of zero
        assert (plain.float() - found.float()).norm() <= bound * plain.float().norm()


def test_a_network_is_trained_so_unless_exact() -> None:
    config = replace(R18_FPN(num_classes=3), fpn_channels=32)
    network = build_network(config, Recipe())
    initialise(network, seed=0)
    for exact in (False, True):
        TrainingForward(network, config=config, recipe=Recipe(), exact=exact)
        parts = [part for part in network.modules() if isinstance(part, ConvNorm)]
        assert all(part.trains_by_winograd is not exact for part in parts)


def test_the_copy_that_runs_is_exact_after_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEWEST_CELLS", "CELLS_PER_CHANNEL"):
        monkeypatch.setattr(winograd_in_training, name, 0)
    config = replace(R18_FPN(num_classes=3), fpn_channels=32)
    network = build_network(config, Recipe())
    initialise(network, seed=0)
    runs = []
    for _ in range(2):
        with torch.inference_mode():
            running = ready_to_run(network, torch.device("cpu"), "fp32", exact=True)
            runs.append(running.features(torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)))
        TrainingForward(network, config=config, recipe=Recipe())
    for before, after in zip(*runs, strict=True):
        assert torch.equal(before, after)

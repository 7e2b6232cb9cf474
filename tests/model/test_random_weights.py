from __future__ import annotations

import pytest
import torch
from torch import nn

import model
from model import MaskRCNN
from model.random_weights import rescale_outputs
from tests.model.conftest import drawn_image

CONFIG = model.R18_FPN(num_classes=3, min_size=64, max_size=128)


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    one = model.random_network(CONFIG, seed=3)
    torch.manual_seed(2)
    same, other = model.random_network(CONFIG, seed=3), model.random_network(CONFIG, seed=4)
    assert one.sha256 == same.sha256
    assert one.sha256 != other.sha256
    assert one.name == "random-3"


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model.random_network(CONFIG, seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_every_image_has_detections(small_net: MaskRCNN) -> None:
    for seed in range(4):
        (found,) = small_net.predict([drawn_image(100 + 20 * seed, 160, seed=seed)])
        assert len(found) == 100
        assert (found.areas > 0).sum() > 50


def test_outputs_get_the_deviation_asked_for_step_by_step() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 50), nn.Linear(50, 50)
    x = torch.randn(40, 8)

    def run() -> None:
        second(first(x))
        second(first(x * 2))

    rescale_outputs([[(first, 2.0)], [(second, 0.3)]], run)
    inner = torch.cat([first(x), first(x * 2)])
    assert inner.std().item() == pytest.approx(2.0, rel=1e-5)
    assert second(inner).std().item() == pytest.approx(0.3, rel=1e-5)


def test_a_layer_that_does_not_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing reached Linear"):
        rescale_outputs([[(nn.Linear(1, 1), 1.0)]], lambda: None)

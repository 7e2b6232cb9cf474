"""A new network: its scale is kept from layer to layer, and at first every answer is as likely."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model import R18_FPN, R50_FPN, ModelConfig, Recipe
from model.ground_truth import GroundTruth, collate
from model.initial_weights import initialise
from model.network import build_network
from model.training import TrainingForward
from tests.model.conftest import drawn_image


@pytest.mark.parametrize("config", [R18_FPN(num_classes=6), R50_FPN(num_classes=6)], ids=["R18-FPN", "R50-FPN"])
def test_the_first_losses_are_those_of_a_guess(config: ModelConfig) -> None:
    config = replace(config, min_size=128, max_size=128)
    network = build_network(config, Recipe())
    initialise(network, seed=0)
    image = drawn_image(128, 128)
    masks = torch.zeros(1, 128, 128, dtype=torch.uint8)
    masks[0, 30:90, 40:100] = 1
    truth = GroundTruth(boxes=torch.tensor([[40.0, 30.0, 100.0, 90.0]]), labels=torch.tensor([2]), masks=masks)
    forward = TrainingForward(network, config=config, recipe=Recipe())
    with torch.no_grad():
        losses = forward(collate([image, image], [truth, truth], config=config, recipe=Recipe(), seeds=[0, 1]))
    assert float(losses["class"]) == pytest.approx(math.log(6), rel=0.3)
    for name in ("rpn_objectness", "mask"):
        assert float(losses[name]) == pytest.approx(math.log(2), rel=0.2)


def test_the_seed_alone_decides() -> None:
    networks = [build_network(R18_FPN(num_classes=3), Recipe()) for _ in range(3)]
    for network, seed in zip(networks, (5, 5, 6), strict=True):
        initialise(network, seed)
    one, same, other = (network.tensors() for network in networks)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["body.stem.conv.weight"], other["body.stem.conv.weight"])

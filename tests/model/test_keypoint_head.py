"""The keypoint head against torchvision's, and by hand."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

from model.keypoint_head import KeypointHead


def random_head(seed: int, *, in_channels: int = 6, num_convs: int = 8) -> KeypointHead:
    torch.manual_seed(seed)
    return KeypointHead(in_channels=in_channels, channels=10, num_convs=num_convs, num_keypoints=3)


@torch.no_grad()
def test_agrees_with_torchvision() -> None:
    head = random_head(0)
    theirs = nn.Sequential(KeypointRCNNHeads(6, [10] * 8), KeypointRCNNPredictor(10, 3))
    theirs.load_state_dict(dict(zip(theirs.state_dict(), head.state_dict().values(), strict=True)))
    region_features = torch.randn(4, 6, 14, 14)
    heatmaps = head(region_features)
    assert heatmaps.shape == (4, 3, 56, 56)
    torch.testing.assert_close(heatmaps, theirs(region_features))


@torch.no_grad()
def test_one_cell_becomes_a_tent_by_hand() -> None:
    head = KeypointHead(in_channels=1, num_convs=0, num_keypoints=1)
    # Row a and column b of the kernel hold u[a] u[b]: bilinear upsampling, and again by two.
    u = torch.tensor([0.25, 0.75, 0.75, 0.25])
    head.upsample.weight.copy_(torch.outer(u, u))
    head.upsample.bias = None
    cell = torch.zeros(1, 1, 3, 3)
    cell[0, 0, 1, 1] = 1
    # The first doubling puts 1/4, 3/4, 3/4, 1/4 at 1 to 4 of 0 to 5; the second takes 3/4 of the nearer and 1/4.
    once = [0.0, 0.25, 0.75, 0.75, 0.25, 0.0]
    twice = [0.0]
    for left, right in pairwise(once):
        twice += [0.75 * left + 0.25 * right, 0.25 * left + 0.75 * right]
    profile = torch.tensor([*twice, 0.0])
    torch.testing.assert_close(head(cell)[0, 0], torch.outer(profile, profile))


@torch.no_grad()
def test_regions_do_not_affect_each_other() -> None:
    head = random_head(1)
    region_features = torch.randn(5, 6, 7, 7)
    torch.testing.assert_close(head(region_features)[2:3], head(region_features[2:3]))


def test_every_parameter_learns() -> None:
    head = random_head(2, num_convs=2)
    head(torch.randn(3, 6, 7, 7)).square().sum().backward()
    assert set(dict(head.named_parameters())) == {
        f"{layer}.{kind}" for layer in ("convs.0.conv", "convs.1.conv", "upsample") for kind in ("weight", "bias")
    }
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@torch.no_grad()
def test_heatmaps_are_float32_whatever_the_layers() -> None:
    head = random_head(3).bfloat16()
    assert head(torch.randn(1, 6, 7, 7).bfloat16()).dtype == torch.float32


def test_no_regions() -> None:
    heatmaps = random_head(4)(torch.zeros(0, 6, 14, 14))
    assert heatmaps.shape == (0, 3, 56, 56)
    heatmaps.sum().backward()

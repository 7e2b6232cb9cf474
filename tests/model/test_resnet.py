from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision

from model.config import R50_FPN
from model.conv_norm import FixedNorm
from model.resnet import ResNet, resnet18, resnet50
from model.torchvision_weights import torchvision_name

NORM = partial(FixedNorm, eps=1e-5, form="batch")


@pytest.mark.parametrize(("make", "last"), [(resnet18, 512), (resnet50, 2048)])
def test_strides_and_widths(make: Callable[..., ResNet], last: int) -> None:
    with torch.device("meta"):
        body = make(norm=NORM)
        features = body(torch.zeros(2, 3, 64, 96))
    widths = [last // 8, last // 4, last // 2, last]
    assert body.out_channels == tuple(widths)
    assert [tuple(feature.shape) for feature in features] == [
        (2, width, 64 // stride, 96 // stride) for width, stride in zip(widths, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.inference_mode()
def test_agrees_with_torchvision(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    body = {"resnet18": resnet18, "resnet50": resnet50}[name](norm=NORM)
    tensors = theirs.state_dict()
    prefix = "backbone.body."
    body.load_state_dict(
        {key: tensors[torchvision_name(f"body.{key}", R50_FPN()).removeprefix(prefix)] for key in body.state_dict()}
    )
    x = torch.randn(1, 3, 64, 96)
    expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for feature, stage in zip(body(x), (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
        expected = stage(expected)
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

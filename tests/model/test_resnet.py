from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision

from model.config import R50_FPN, Body
from model.norm import norm_of
from model.resnet import ARCHITECTURES, ResNet
from model.torchvision_weights import torchvision_name

NORM = norm_of("batch", 1e-5)


@pytest.mark.parametrize(("name", "last"), [("resnet18", 512), ("resnet50", 2048), ("resnext101_32x8d", 2048)])
def test_strides_and_widths(name: Body, last: int) -> None:
    with torch.device("meta"):
        body = ResNet(ARCHITECTURES[name], stride_in="3x3", norm=NORM)
        features = body(torch.zeros(2, 3, 64, 96))
    widths = [last // 8, last // 4, last // 2, last]
    assert body.out_channels == tuple(widths)
    assert [tuple(feature.shape) for feature in features] == [
        (2, width, 64 // stride, 96 // stride) for width, stride in zip(widths, (4, 8, 16, 32), strict=True)
    ]


def test_a_narrower_body_has_fewer_channels_everywhere() -> None:
    for name in ARCHITECTURES:
        with torch.device("meta"):
            body = ResNet(replace(ARCHITECTURES[name], width=32), stride_in="3x3", norm=NORM)
            whole = ResNet(ARCHITECTURES[name], stride_in="3x3", norm=NORM)
        for (key, narrow), wide in zip(body.named_parameters(), whole.parameters(), strict=True):
            assert narrow.shape[0] * 2 == wide.shape[0], key


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@torch.inference_mode()
def test_agrees_with_torchvision(name: Body) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    body = ResNet(ARCHITECTURES[name], stride_in="3x3", norm=NORM).eval()
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

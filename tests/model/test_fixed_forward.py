"""The forward in fixed shapes, its kernels interpreted, against the one in shapes that hang on the data."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from model import ImageSize, MaskRCNN, transform
from model.anchors import anchors_of
from tests.model.conftest import drawn_image
from tests.model.test_mask_rcnn import _between

pytest.importorskip("triton")

from model.fixed_forward import FixedInputs, detect_fixed
from model.network import Network, _fuse_on_cuda, ready_to_run
from model.raw_detections import MaskTexts, RawDetections, encode
from model.rle import area

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def net() -> MaskRCNN:
    """R18-FPN with random weights, few proposals and few detections."""
    config = replace(model.R18_half_FPN(num_classes=4), min_size=96, max_size=160, fpn_channels=32)
    recipe = replace(model.Recipe(), rpn_pre_nms=40, rpn_post_nms=20, max_detections=8)
    return model.random_network(config, seed=1, recipe=recipe, image=drawn_image(90, 120))


def _folded(network: Network) -> Network:
    """What runs on a CPU, each part by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.network._fuse_on_cpu", lambda *_: None)
        return ready_to_run(network, torch.device("cpu"), "fp32", exact=False)


def test_fused_parts_are_their_parts(net: MaskRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":  # cuDNN's operators, written out
        monkeypatch.setattr(
            torch, "cudnn_convolution_relu", lambda x, weight, bias, *shape: F.conv2d(x, weight, bias, *shape).relu()
        )
        monkeypatch.setattr(
            torch,
            "cudnn_convolution_add_relu",
            lambda x, weight, plus, _, bias, *shape: (F.conv2d(x, weight, bias, *shape) + plus).relu(),
        )
    plain = _folded(net.network)
    fused = copy.deepcopy(plain)
    _fuse_on_cuda(fused)
    plain, fused = plain.to(DEVICE), fused.to(DEVICE)
    pixels = torch.randn(2, 3, 64, 96, device=DEVICE).to(memory_format=torch.channels_last)
    regions = torch.randn(5, net.config.fpn_channels, 7, 7, device=DEVICE).to(memory_format=torch.channels_last)
    cells = torch.randn(5, net.config.fpn_channels, 14, 14, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.tensor([1, 2, 3, 1, 2], device=DEVICE)
    for network in (plain, fused):
        assert network.rpn is not None
        assert network.mask_head is not None
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, theirs = fused.features(pixels), plain.features(pixels)
        pairs = list(zip(ours, theirs, strict=True))
        for level, other in list(pairs):
            pairs += zip(fused.rpn(level), plain.rpn(other), strict=True)  # type: ignore[misc]
        pairs += zip(fused.box_head(regions), plain.box_head(regions.clone()), strict=True)
        pairs.append((fused.mask_head(cells, labels), plain.mask_head(cells.clone(), labels)))  # type: ignore[misc]
        for network in (fused, plain):  # no region, no detection
            assert network.mask_head is not None
            assert network.mask_head(cells[:0], labels[:0]).shape == (0, 28, 28)
            assert [len(outputs) for outputs in network.box_head(regions[:0])] == [0, 0]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_fixed_shapes_find_what_any_shapes_find(net: MaskRCNN) -> None:
    inexact = MaskRCNN(
        net.network,
        config=net.config,
        recipe=net.recipe,
        categories=net.categories,
        name="",
        sha256="",
        device=DEVICE,
        exact=False,
    )
    images = [drawn_image(90, 120), drawn_image(96, 128, seed=1)]
    sizes = [ImageSize(*image.shape[:2]) for image in images]
    resized = [transform.resized_size(size, min_size=96, max_size=160) for size in sizes]
    padded = net.padded_size(sizes[0])
    inputs = FixedInputs(
        transform.to_input(images, resized, padded=padded, recipe=net.recipe, device=DEVICE).to(
            memory_format=torch.channels_last
        ),
        torch.tensor(sizes, dtype=torch.float32, device=DEVICE),
        torch.tensor(resized, dtype=torch.float32, device=DEVICE),
        torch.tensor(0.05, device=DEVICE),
    )
    cells = [cell.to(DEVICE) for cell in anchors_of(net.config, net.recipe)]
    found = detect_fixed(inexact.running, inputs, cells=cells, config=net.config, recipe=net.recipe)
    assert found.mask_texts is not None
    assert not found.uncertain.any()
    raw = RawDetections(
        sizes=sizes,
        boxes=found.boxes.cpu(),
        scores=found.scores.cpu(),
        labels=found.labels.cpu(),
        valid=found.valid.cpu(),
        mask_logits=None,
        mask_texts=MaskTexts(*(values.cpu() for values in found.mask_texts)),
    )
    expected = encode(inexact._detect(images, sizes, 0.05), 0.05, recipe=net.recipe, categories=net.categories)
    together = encode(raw, 0.05, recipe=net.recipe, categories=net.categories)
    for one, other in zip(together, expected, strict=True):
        assert len(one) == len(other) > 3
        difference = _between(one, other)
        assert (difference.count, difference.unmatched) == (0, 0)
        assert difference.mask_pixels <= 2  # that lie on the threshold
        assert np.array_equal(one.areas, [area(mask) for mask in one.masks])

"""Every member of the family runs, and its file holds all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import model
from model import R18_FPN, R50_C4, MaskRCNN, ModelConfig, Recipe
from model.mask_rcnn import Boxes
from tests.model.conftest import drawn_image

SMALL = replace(R18_FPN(num_classes=4, min_size=96, max_size=160), fpn_channels=32, box_head_width=64, mask_channels=32)
C4 = replace(R50_C4(num_classes=4, min_size=96, max_size=160), body="resnet18", mask_channels=32)

FAMILY: dict[str, ModelConfig] = {
    "r18-fpn": SMALL,
    "r18-c4": C4,
    "resnext": replace(SMALL, body="resnext101_32x8d"),
    "frozen": replace(SMALL, norm="frozen"),
    "sync": replace(SMALL, norm="sync", fpn_norm=True, head_norm=True),
    "group": replace(SMALL, norm="group", fpn_norm=True, head_norm=True),
    "roi pool": replace(SMALL, pooling="pool"),
    "softmax masks": replace(SMALL, mask_classes="softmax"),
    "one mask for all": replace(SMALL, mask_classes="agnostic"),
    "mlp masks": replace(SMALL, mask_head="mlp"),
    "mlp softmax masks": replace(SMALL, mask_head="mlp", mask_classes="softmax"),
    "keypoints": replace(SMALL, mask_head="none", num_keypoints=5, keypoint_convs=2, keypoint_channels=32),
    "keypoints and masks": replace(SMALL, num_keypoints=5, keypoint_convs=2, keypoint_channels=32),
    "faster": replace(SMALL, mask_head="none"),
    "fast": replace(SMALL, mask_head="none", proposals="given"),
    "square": replace(SMALL, square=True),
}

IMAGES = [drawn_image(90, 120), drawn_image(120, 90, seed=1)]


@pytest.fixture(scope="module", params=list(FAMILY))
def net(request: pytest.FixtureRequest) -> MaskRCNN:
    """Found what it can on the first image."""
    config = FAMILY[request.param]
    torch.manual_seed(0)
    return model.random_network(config, seed=1, recipe=replace(Recipe(), rpn_post_nms=100), image=IMAGES[0])


def _proposals(net: MaskRCNN) -> list[Boxes] | None:
    if net.network.rpn is not None:
        return None
    x, y = np.meshgrid(np.arange(0, 60, 6.0), np.arange(0, 60, 6.0))
    corners = np.stack([x, y], axis=-1).reshape(-1, 2)
    return [np.hstack([corners, corners + 25]).astype(np.float32)] * len(IMAGES)


def test_finds_what_its_parts_say(net: MaskRCNN) -> None:
    config = net.config
    for image, found in zip(IMAGES, net.predict(IMAGES, 0.1, proposals=_proposals(net)), strict=True):
        assert len(found)
        assert found.size == image.shape[:2]
        assert len(found.masks) == (0 if config.mask_head == "none" else len(found))
        assert (found.keypoints is None) == (config.num_keypoints == 0)
        if found.keypoints is not None:
            assert found.keypoints.shape == (len(found), config.num_keypoints, 3)
            # a keypoint lies in its box, up to half a cell of the resized heatmap
            x, y, boxes = found.keypoints[..., 0], found.keypoints[..., 1], found.boxes[:, None]
            assert (x >= boxes[..., 0] - 1).all()
            assert (x <= boxes[..., 2] + 1).all()
            assert (y >= boxes[..., 1] - 1).all()
            assert (y <= boxes[..., 3] + 1).all()


def test_folded_is_nearly_exact(net: MaskRCNN) -> None:
    names = ("config", "recipe", "categories", "name", "sha256")
    folded = MaskRCNN(net.network, **{name: getattr(net, name) for name in names}, exact=False)
    exact, near = (
        net.predict(IMAGES, 0.3, proposals=_proposals(net)),
        folded.predict(IMAGES, 0.3, proposals=_proposals(net)),
    )
    for one, other in zip(exact, near, strict=True):
        # rounding tips a close decision now and then
        gaps = np.abs(one.boxes[:, None] - other.boxes[None]).max(axis=2).min(axis=1, initial=np.inf)
        assert (gaps < 0.05).mean() > 0.9


def test_its_file_round_trips_bit_for_bit(net: MaskRCNN, tmp_path: Path) -> None:
    model.save(net, tmp_path / "net.safetensors")
    loaded = model.load(tmp_path / "net.safetensors")
    assert (loaded.config, loaded.recipe, loaded.categories) == (net.config, net.recipe, net.categories)
    before, after = net.network.tensors(), loaded.network.tensors()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def test_given_proposals_must_fit() -> None:
    fast = model.random_network(FAMILY["fast"], seed=1, image=IMAGES[0])
    with pytest.raises(ValueError, match="needs proposals"):
        fast.predict(IMAGES)
    with pytest.raises(ValueError, match=r"proposals of image 0 have shape \(3,\)"):
        fast.predict(IMAGES[:1], proposals=[np.zeros(3, np.float32)])
    with_rpn = model.random_network(SMALL, seed=1, image=IMAGES[0])
    with pytest.raises(ValueError, match="leave them out"):
        with_rpn.predict(IMAGES, proposals=[np.zeros((0, 4), np.float32)] * 2)
    assert [len(found) for found in fast.predict(IMAGES, proposals=[np.zeros((0, 4), np.float32)] * 2)] == [0, 0]


def test_a_square_input_is_the_same_for_every_image() -> None:
    square = model.random_network(FAMILY["square"], seed=1, image=IMAGES[0])
    assert {square.padded_size(model.ImageSize(*image.shape[:2])) for image in IMAGES} == {model.ImageSize(160, 160)}

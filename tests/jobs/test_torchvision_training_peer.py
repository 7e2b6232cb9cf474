"""The peer is torchvision's own network: what our batches give it is what it would make of the images itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

import model
from jobs.torchvision_training_peer import torchvision_trainee
from jobs.train_config import TrainConfig
from model import R18_FPN, R50_FPN, ImageSize, MaskRCNN
from model.ground_truth import GroundTruth, collate
from model.losses import LossConfig
from pipeline.errors import ConfigError
from pipeline.scenes import CATEGORIES, Scene, draw_scene
from pipeline.worker_group import WorkerGroup

SIZE = ImageSize(96, 128)
CONFIG = replace(
    R18_FPN(num_classes=1 + len(CATEGORIES), min_size=96, max_size=128),
    body_width=32,
    fpn_channels=32,
    fpn_norm=True,
    mask_channels=32,
)


@pytest.fixture(scope="module")
def start() -> MaskRCNN:
    return model.random_network(CONFIG, seed=0, categories=dict(enumerate(CATEGORIES, 1)))


def options(**losses: Any) -> TrainConfig:
    limits: dict[str, Any] = {"rpn_pre_nms": 200, "rpn_post_nms": 100, "box_samples": 64}
    return TrainConfig(train_annotations="", train_images="", output="", losses=LossConfig(**{**limits, **losses}))


def truth_of(scene: Scene) -> GroundTruth:
    boxes = []
    for mask in scene.masks:
        y, x = mask.nonzero()
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return GroundTruth(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.from_numpy(scene.category_ids),
        masks=torch.from_numpy(scene.masks.astype(np.uint8)),
    )


def test_losses_are_those_torchvision_computes_from_the_images(start: MaskRCNN) -> None:
    scenes = [draw_scene(seed, SIZE) for seed in range(2)]
    truths = [truth_of(scene) for scene in scenes]
    batch = collate([scene.image for scene in scenes], truths, config=CONFIG, recipe=start.recipe)
    trainee = torchvision_trainee(start, options(), WorkerGroup(), torch.device("cpu"))
    network: Any = trainee.network
    images = [torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255 for scene in scenes]
    targets = [{"boxes": truth.boxes, "labels": truth.labels, "masks": truth.masks} for truth in truths]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network.transform(images, targets)  # draws a size for each image, even from one
        found = trainee.forward(batch)
        torch.manual_seed(1)
        expected = network(images, targets)
    names = {"loss_objectness": "rpn_objectness", "loss_rpn_box_reg": "rpn_box", "loss_classifier": "class"}
    names |= {"loss_box_reg": "box", "loss_mask": "mask"}
    for name, loss in expected.items():
        torch.testing.assert_close(found[names[name]], loss, rtol=1e-5, atol=0)
    torch.autograd.backward(list(found.values()))
    assert all(parameter.grad is not None for parameter in trainee.network.parameters())


def test_it_has_as_many_parameters_as_ours(start: MaskRCNN) -> None:
    trainee = torchvision_trainee(start, options(), WorkerGroup(), torch.device("cpu"))
    theirs, ours = (sum(one.numel() for one in network.parameters()) for network in (trainee.network, start.network))
    # its pyramid has no biases beside its norms, its mask predictor and box deltas know the background
    assert theirs == pytest.approx(ours, rel=0.01)


def test_detections_are_whole(start: MaskRCNN) -> None:
    trainee = torchvision_trainee(start, options(), WorkerGroup(), torch.device("cpu"))
    image = draw_scene(0, ImageSize(100, 150)).image
    (found,) = trainee.predictor(trainee.network)([image])
    assert found.size == (100, 150)
    assert len(found.boxes) == len(found.masks) == len(found.scores) == len(found.categories)
    assert all(mask["size"] == [100, 150] for mask in found.masks)


def test_a_shape_torchvision_lacks_is_refused(start: MaskRCNN) -> None:
    other = model.random_network(replace(CONFIG, mask_head="mlp"), seed=0)
    with pytest.raises(ConfigError, match="torchvision peer"):
        torchvision_trainee(other, options(), WorkerGroup(), torch.device("cpu"))


@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
@torch.inference_mode()
def test_its_body_is_its_own_with_our_weights(norm: Literal["frozen", "batch", "group"]) -> None:
    config = replace(R50_FPN(num_classes=3, min_size=64, max_size=96), norm=norm)
    start = model.random_network(config, seed=0, categories={1: "a", 2: "b"})
    network: Any = torchvision_trainee(start, options(), WorkerGroup(), torch.device("cpu")).network
    assert not any(module is start.network.body for module in network.modules())
    pixels = torch.randn(1, 3, 64, 96)
    for theirs, ours in zip(network.eval().backbone.body(pixels), start.network.eval().body(pixels), strict=True):
        assert torch.equal(theirs, ours)

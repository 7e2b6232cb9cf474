"""Each member of the family learns four drawn images by heart: the losses fall and the objects are found again."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model import R18_FPN, R50_C4, Detections, ImageSize, MaskRCNN, ModelConfig, Recipe
from model.ground_truth import GroundTruth, collate
from model.initial_weights import initialise
from model.losses import LossConfig
from model.network import Network, build_network
from model.training import TrainingForward
from pipeline.scenes import CATEGORIES, Scene, draw_scene
from tests.reference.average_precision import average_precision

SIZE = ImageSize(96, 128)
STEPS = {"keypoints": 450, "RoIPool": 1000}
OTHER_STEPS = 320
LEARNING_RATE = 2e-3
NUM_POINTS = 5

FPN = replace(
    R18_FPN(num_classes=1 + len(CATEGORIES), min_size=96, max_size=128),
    norm="group",  # the same while training as afterwards
    fpn_channels=64,
    anchor_sizes=(8, 16, 32, 64, 128),
    box_head_width=128,
    mask_channels=64,
)
C4 = replace(
    R50_C4(num_classes=1 + len(CATEGORIES), min_size=192, max_size=256),  # so that stride 16 is 8 pixels of the image
    body="resnet18",
    body_width=32,
    norm="group",
    anchor_sizes=(16, 32, 64, 128),
    box_resolution=8,
    mask_resolution=8,
    mask_channels=64,
)
CONFIGS: dict[str, ModelConfig] = {
    "R18-FPN": FPN,
    "R18-C4": C4,
    "keypoints": replace(
        FPN, mask_head="none", num_keypoints=NUM_POINTS, keypoint_convs=2, keypoint_channels=64, keypoint_resolution=8
    ),
    "Faster": replace(FPN, mask_head="none"),
    "RoIPool": replace(FPN, pooling="pool"),
    "softmax masks": replace(FPN, mask_classes="softmax"),
}
RECIPE = replace(Recipe(), rpn_post_nms=100)
LOSSES = LossConfig(
    rpn_samples=64,
    box_samples=32,
    box_positive_fraction=0.5,
    rpn_pre_nms=300,
    rpn_post_nms=100,
    mask_target="binary",  # what is half in a cell costs something for ever
)


QUICK_STEPS = 50
"""After which the loss is half of what it was; to learn by heart takes two minutes."""


def test_begins_to_learn() -> None:
    _, history = _learnt(FPN, [draw_scene(seed, SIZE) for seed in range(4)], num_steps=QUICK_STEPS)
    sys.stdout.write(f"loss {history[0]:.2f} → {np.mean(history[-5:]):.3f}\n")
    assert np.mean(history[-5:]) < 0.6 * history[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_learns_four_images_by_heart(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS[name]
    scenes = [draw_scene(seed, SIZE) for seed in range(4)]
    network, history = _learnt(config, scenes, num_steps=STEPS.get(name, OTHER_STEPS))
    net = MaskRCNN(
        network, config=config, recipe=RECIPE, categories=dict(enumerate(CATEGORIES, 1)), name=name, sha256=""
    )
    found = net.predict([scene.image for scene in scenes])
    truth = [(scene.masks, scene.category_ids) for scene in scenes]
    precision = average_precision(truth, found, list(CATEGORIES))
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: loss {history[0]:.2f} → {np.mean(history[-10:]):.3f}, AP50 {precision:.3f}\n")
    assert np.mean(history[-10:]) < 0.1 * history[0]
    assert precision >= 0.9
    if config.num_keypoints:
        assert _keypoint_error(scenes, found) < 2


def _learnt(config: ModelConfig, scenes: list[Scene], *, num_steps: int) -> tuple[Network, list[float]]:
    """A new network after so many steps on these images, and the sum of its losses at each."""
    network = build_network(config, RECIPE)
    initialise(network, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        forward = TrainingForward(network, config=config, recipe=RECIPE, losses=LOSSES)
        return network, _train(forward, scenes, num_steps=num_steps)


def _train(forward: TrainingForward, scenes: list[Scene], *, num_steps: int) -> list[float]:
    """The sum of the losses at each step."""
    truths = [_truth(scene) for scene in scenes]
    batch = collate([scene.image for scene in scenes], truths, config=forward.config, recipe=forward.recipe)
    optimiser = torch.optim.AdamW(forward.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    history = []
    for _ in range(num_steps):
        loss = torch.stack(list(forward.train()(batch).values())).sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(forward.parameters(), 10.0)
        optimiser.step()
        schedule.step()
        history.append(loss.item())
    return history


def _truth(scene: Scene) -> GroundTruth:
    boxes = [_box(mask) for mask in scene.masks]
    return GroundTruth(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.from_numpy(scene.category_ids),
        masks=torch.from_numpy(scene.masks.astype(np.uint8)),
        keypoints=torch.stack([_points(mask) for mask in scene.masks]),
    )


def _box(mask: np.ndarray[Any, Any]) -> list[int]:
    y, x = mask.nonzero()
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def _points(mask: np.ndarray[Any, Any]) -> torch.Tensor:
    """(5, 3) centre of the box and the outermost pixels on four sides, all seen."""
    y, x = mask.nonzero()
    ends = [(x[index] + 0.5, y[index] + 0.5) for index in (x.argmin(), x.argmax(), y.argmin(), y.argmax())]
    x1, y1, x2, y2 = _box(mask)
    return torch.tensor([(px, py, 2) for px, py in [((x1 + x2) / 2, (y1 + y2) / 2), *ends]], dtype=torch.float32)


def _keypoint_error(scenes: list[Scene], found: list[Detections]) -> float:
    """Median distance, in pixels, of the points of each object from those of the detection that overlaps it most."""
    errors = []
    for scene, detections in zip(scenes, found, strict=True):
        assert detections.keypoints is not None
        for mask in scene.masks:
            gaps = np.abs(detections.boxes - np.array(_box(mask))).max(axis=1)
            points = _points(mask).numpy()[:, :2]
            errors.append(np.linalg.norm(detections.keypoints[gaps.argmin(), :, :2] - points, axis=1))
    return float(np.median(np.concatenate(errors)))

"""Losses and gradients against torchvision's own, its samplers replaced by one that both follow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn

import model
from jobs.torchvision_peer import torchvision_network
from model import (
    R18_FPN,
    R50_C4,
    ModelConfig,
    Recipe,
    conv_norm,
    mask_targets,
    matcher,
    pooling,
    roi_align,
    training,
    winograd_in_training,
)
from model.boxes import Places, first_marked
from model.ground_truth import GroundTruth, collate
from model.initial_weights import initialise
from model.losses import Divisor, LossConfig, own_count
from model.network import Network, build_network
from model.optimiser import OptimiserConfig, build_optimiser, take_step
from model.packed_batch import pack
from model.structures import ImageSize
from model.torchvision_weights import torchvision_name
from model.training import TrainingForward
from tests.model.conftest import coco_paths, drawn_image, needs_compiled, read_image

MIN_SIZE, MAX_SIZE = 160, 256

LOSSES = {
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


class Spread:
    """Some of the positives and of the negatives, spread over all: ours of a batch, and torchvision's of a list."""

    def __init__(self, count: int, positive_fraction: float) -> None:
        self.count, self.positive_fraction = count, positive_fraction

    def ours(self, label: Tensor, seeds: object = None) -> Places:
        return first_marked(self._chosen(label), limit=self.count)

    def _chosen(self, label: Tensor) -> Tensor:
        most = torch.full((len(label), 1), int(self.count * self.positive_fraction))
        positive = self._some(label > 0, most)
        return positive | self._some(label == 0, self.count - positive.sum(dim=1, keepdim=True))

    def _some(self, among: Tensor, count: Tensor) -> Tensor:
        # a prime times the rank, modulo how many there are, is another order of them
        total = among.sum(dim=1, keepdim=True).clamp(min=1)
        return among & ((among.cumsum(1) - 1) * 7919 % total < count)

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen = [self._chosen(label[None])[0] for label in labels]
        positive = [one & (label > 0) for one, label in zip(chosen, labels, strict=True)]
        return positive, [one & (label == 0) for one, label in zip(chosen, labels, strict=True)]


def objects(image: NDArray[np.uint8], *, seed: int, count: int = 6, num_classes: int = 91) -> GroundTruth:
    """Boxes anywhere in the image, each filled by an ellipse."""
    generator = np.random.default_rng(seed)
    height, width = image.shape[:2]
    corners = generator.uniform(0, 0.7, (count, 2)) * (width, height)
    sides = generator.uniform(0.1, 0.3, (count, 2)) * (width, height)
    boxes = np.hstack([corners, corners + sides])
    y, x = np.mgrid[:height, :width] + 0.5
    masks = [
        (((x - x1 - (x2 - x1) / 2) / (x2 - x1)) ** 2 + ((y - y1 - (y2 - y1) / 2) / (y2 - y1)) ** 2) < 0.25
        for x1, y1, x2, y2 in boxes
    ]
    return GroundTruth(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor(generator.integers(1, num_classes, count)),
        masks=torch.tensor(np.array(masks).reshape(count, height, width), dtype=torch.uint8),
    )


@pytest.mark.parametrize(("exact", "bound"), [(True, 1e-4), (False, 3e-4)])
def test_losses_and_gradients_are_torchvisions(exact: bool, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unless exact, RoIAlign sums in another order: where the mask head's gradients nearly cancel, 1.2e-4 is seen.
    # Of proposals as good as each other Winograd's roundings would choose others (below).
    monkeypatch.setattr(winograd_in_training, "FEWEST_CHANNELS", {})
    images = [read_image(path) for path in coco_paths()[:2]] or [drawn_image(120, 180), drawn_image(150, 110)]
    truths = [objects(image, seed=seed) for seed, image in enumerate(images)]
    theirs = torchvision_network("v1", images[0], min_size=MIN_SIZE, max_size=MAX_SIZE).requires_grad_(True)
    ours = _trainable(theirs)
    rpn_sampler, box_sampler = Spread(256, 0.5), Spread(512, 0.25)
    theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler = rpn_sampler, box_sampler  # type: ignore[union-attr]

    expected = theirs.train()(
        [torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images],
        [{"boxes": truth.boxes, "labels": truth.labels, "masks": truth.masks} for truth in truths],
    )
    sum(expected.values()).backward()
    config, recipe, network = ours
    forward = TrainingForward(
        network, config=config, recipe=recipe, rpn_sampler=rpn_sampler.ours, box_sampler=box_sampler.ours, exact=exact
    ).train()
    found = forward(collate(images, truths, config=config, recipe=recipe))
    torch.autograd.backward(list(found.values()))

    assert {LOSSES[name] for name in expected} == set(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[LOSSES[name]], value, rtol=1e-5, atol=0)
    gradients = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in network.named_parameters():
        their_name = torchvision_name(name, config)
        expected_gradient = gradients.pop(their_name).grad
        assert expected_gradient is not None
        assert parameter.grad is not None, name
        difference = (parameter.grad - expected_gradient).norm() / expected_gradient.norm()
        assert difference <= bound, f"{name}: {difference}"
        compared += 1
    assert not gradients
    assert compared == len(list(network.parameters()))


def _trainable(theirs: nn.Module) -> tuple[ModelConfig, Recipe, Network]:
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    net = model.load(file.getvalue())
    return replace(net.config, min_size=MIN_SIZE, max_size=MAX_SIZE), net.recipe, net.network


SMALL = replace(
    R18_FPN(num_classes=6, min_size=96, max_size=128),
    norm="group",
    fpn_channels=32,
    anchor_sizes=(8, 16, 32, 64, 128),
    box_head_width=32,
    mask_channels=32,
)
IMAGES = [drawn_image(96, 128), drawn_image(80, 120, seed=1)]
NOTHING = GroundTruth(
    boxes=torch.zeros(0, 4),
    labels=torch.zeros(0, dtype=torch.int64),
    masks=torch.zeros(0, 96, 128, dtype=torch.uint8),
    keypoints=torch.zeros(0, 3, 3),
    proposals=torch.tensor([[0.0, 0.0, 50.0, 50.0]]),
)


def forward_of(config: ModelConfig, *, seed: int = 0, **losses: Any) -> TrainingForward:
    network = build_network(config, Recipe())
    initialise(network, seed)
    limits: dict[str, Any] = {"rpn_samples": 64, "box_samples": 32, "rpn_pre_nms": 100, "rpn_post_nms": 50}
    return TrainingForward(network, config=config, recipe=Recipe(), losses=LossConfig(**{**limits, **losses}))


def losses_of(forward: TrainingForward, truths: list[GroundTruth], *, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found: dict[str, Tensor] = forward(
            collate(IMAGES[: len(truths)], truths, config=forward.config, recipe=forward.recipe)
        )
    return found


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, mask_head="none", num_keypoints=3, keypoint_convs=1, keypoint_channels=16),
        replace(SMALL, mask_classes="softmax"),
        replace(SMALL, mask_head="none", proposals="given"),
    ],
)
def test_images_without_objects_train_the_rest(config: ModelConfig) -> None:
    forward = forward_of(config)
    losses = losses_of(forward, [NOTHING])
    torch.autograd.backward(list(losses.values()))
    assert all(value.isfinite() for value in losses.values())
    assert losses["class"] > 0
    assert losses["box"] == 0
    assert all(losses[name] == 0 for name in ("mask", "keypoint", "rpn_box") if name in losses)
    for name, parameter in forward.network.named_parameters():
        assert parameter.grad is not None, name  # DDP waits for each of them
        assert parameter.grad.isfinite().all(), name


def test_the_form_of_masks_makes_little_difference() -> None:
    truth = objects(IMAGES[0], seed=3, num_classes=6)
    assert isinstance(truth.masks, Tensor)
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in truth.masks.numpy()]
    circle = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
    outlines = [[center + axes * circle] for center, axes in _ellipses(truth.boxes.numpy())]
    forward = forward_of(SMALL)
    soft = losses_of(forward, [truth])["mask"]
    assert losses_of(forward, [replace(truth, masks=rles)])["mask"] == soft
    drawn = losses_of(forward_of(SMALL, mask_target="polygon"), [replace(truth, masks=outlines)])["mask"]
    binary = losses_of(forward_of(SMALL, mask_target="binary"), [truth])["mask"]
    torch.testing.assert_close(drawn, soft, rtol=0.1, atol=0)
    torch.testing.assert_close(binary, soft, rtol=0.1, atol=0)
    assert len({float(value) for value in (soft.detach(), drawn.detach(), binary.detach())}) == 3


ANGLES = np.linspace(0, 2 * np.pi, 65)[:-1]


def _ellipses(boxes: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Centre and half axes."""
    for x1, y1, x2, y2 in boxes:
        yield np.array([(x1 + x2) / 2, (y1 + y2) / 2]), np.array([(x2 - x1) / 2, (y2 - y1) / 2])


def test_nothing_in_a_crowd_is_background() -> None:
    everywhere = torch.tensor([[-999.0, -999.0, 999.0, 999.0]])  # anchors reach out of the image
    losses = losses_of(forward_of(SMALL), [replace(NOTHING, crowd_boxes=everywhere)])
    # no anchor and no proposal is left to learn from
    assert [float(losses[name].detach()) for name in ("rpn_objectness", "class")] == [0.0, 0.0]


def test_the_seed_alone_decides_the_losses() -> None:
    truths = [objects(image, seed=seed, num_classes=6) for seed, image in enumerate(IMAGES)]
    forward = forward_of(SMALL)
    first, again, other = (losses_of(forward, truths, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["class"], other["class"])


def test_half_precision_keeps_losses_in_float32_and_near() -> None:
    truths = [objects(image, seed=seed, num_classes=6) for seed, image in enumerate(IMAGES)]
    forward = forward_of(SMALL)
    exact = losses_of(forward, truths)
    with torch.autocast("cpu", torch.bfloat16):
        near = losses_of(forward, truths)
    for name, value in near.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.2, atol=0.05)


@needs_compiled
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_winograd_changes_losses_and_gradients_by_roundings(
    dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = forward_of(SMALL)
    truths = [objects(image, seed=seed, num_classes=6) for seed, image in enumerate(IMAGES)]
    batch = collate(IMAGES, truths, config=forward.config, recipe=forward.recipe, seeds=[3, 4])
    proposals = forward._propose(forward.network.features(batch.pixels), batch)
    # Of two proposals as good as each other it may take another.
    monkeypatch.setattr(forward, "_propose", lambda *_: proposals)
    monkeypatch.setattr(winograd_in_training, "has_bf16_tiles", lambda: False)
    runs = []
    for name in ("FEWEST_CELLS", "CELLS_PER_CHANNEL"):
        monkeypatch.setattr(winograd_in_training, name, 0)
    for fewest in ({}, {torch.float32: 32, torch.bfloat16: 32}):
        monkeypatch.setattr(winograd_in_training, "FEWEST_CHANNELS", fewest)
        forward.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses: dict[str, Tensor] = forward(batch)
        torch.autograd.backward(list(losses.values()))
        parameters = dict(forward.named_parameters())
        assert [name for name, one in parameters.items() if one.grad is None] == []
        gradients = torch.cat([one.grad.flatten() for one in parameters.values() if one.grad is not None])
        runs.append((torch.stack(list(losses.values())).detach(), gradients))
    (plain, expected), (by_winograd, found) = runs
    assert not torch.equal(found, expected)
    torch.testing.assert_close(by_winograd, plain, rtol=bound, atol=0)
    assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("where", ["here", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("norm", "count"), [("frozen", 3), ("batch", 0)])
def test_half_precision_by_kernels_keeps_losses_near(
    norm: Literal["frozen", "batch"], count: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what follows a convolution runs with it there, regions are filled up
    device = torch.device("cuda" if torch.cuda.is_available() or where == "gpu" else "cpu")
    limits = {"rpn_pre_nms": 20, "rpn_post_nms": 10, "box_samples": 8}
    forward = forward_of(replace(SMALL, norm=norm, fpn_norm=norm == "batch"), **limits).to(device)
    forward.to(memory_format=torch.channels_last)
    truths = [objects(image, seed=seed, count=count, num_classes=6) for seed, image in enumerate(IMAGES)]
    batch = collate(IMAGES, truths, config=forward.config, recipe=forward.recipe, seeds=[3, 4], device=device)
    exact = forward(batch)
    monkeypatch.setattr(training, "_REGIONS_STEP", 4)
    for module in (training, conv_norm):
        monkeypatch.setattr(module, "run_kernels_on", lambda _: True)
    forward.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16):
        near = forward(batch)
    torch.autograd.backward(list(near.values()))
    for name, value in near.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.2, atol=0.05)
    for name, parameter in forward.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("where", ["here", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (SMALL, (3, 0)),
        (SMALL, (0, 0)),
        (replace(SMALL, norm="batch", fpn_norm=True, head_norm=True), (3, 2)),  # regions filled up would count
        (replace(R50_C4(num_classes=4, min_size=64, max_size=96), body="resnet18", body_width=8), (2, 1)),
        (replace(SMALL, mask_head="none", num_keypoints=3, keypoint_convs=1, keypoint_channels=16), (1, 1)),
    ],
    ids=["FPN", "no objects", "norms in heads", "C4", "keypoints"],
)
def test_kernels_give_the_same_losses_and_gradients(
    config: ModelConfig, counts: tuple[int, int], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what a GPU runs, without one its kernels interpreted: proposals and regions in fixed places, some of them empty,
    # RoIAlign in one launch
    device = torch.device("cuda" if torch.cuda.is_available() or where == "gpu" else "cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # a last bit would be a thousand of them
    forward = forward_of(config, rpn_pre_nms=20, rpn_post_nms=10, box_samples=16).to(device)
    truths = [
        replace(objects(image, seed=seed, count=count, num_classes=4), keypoints=torch.ones(count, 3, 3))
        for seed, (image, count) in enumerate(zip(IMAGES, counts, strict=True))
    ]
    batch = collate(IMAGES, truths, config=forward.config, recipe=forward.recipe, seeds=[3, 4], device=device)
    results = []
    monkeypatch.setattr(training, "_REGIONS_STEP", 4)
    for run in (False, True):
        for module in (training, pooling, roi_align, mask_targets, matcher):
            monkeypatch.setattr(module, "run_kernels_on", lambda device, run=run: run)
        forward.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = forward(batch)
        torch.autograd.backward(list(losses.values()))
        results.append((losses, {name: one.grad for name, one in forward.named_parameters() if one.grad is not None}))
    (expected, expected_gradients), (found, gradients) = results
    assert list(found) == list(expected)
    assert list(gradients) == list(expected_gradients)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-7)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_waits_for_the_device_nowhere_but_for_how_many_masks_there_are() -> None:
    device = torch.device("cuda")
    forward = forward_of(replace(SMALL, norm="frozen")).to(device).to(memory_format=torch.channels_last)
    optimiser = build_optimiser(forward, OptimiserConfig())
    truths = [objects(image, seed=seed, num_classes=6) for seed, image in enumerate(IMAGES)]
    packed = pack(IMAGES, truths, config=forward.config, recipe=forward.recipe, seeds=[3, 4])
    try:
        for mode in ("default", "error"):  # the first step compiles, and fills what is kept
            torch.cuda.set_sync_debug_mode(mode)
            batch = packed.to(device)
            with torch.autocast("cuda", torch.bfloat16):
                losses: dict[str, Tensor] = forward(batch)
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
            take_step(optimiser, [one.detach() for one in losses.values()], OptimiserConfig())
            optimiser.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ground_truth_that_does_not_fit_is_refused() -> None:
    truth = objects(IMAGES[0], seed=0, num_classes=6)
    recipe = Recipe()
    with pytest.raises(ValueError, match="no masks, which this network is trained with"):
        collate(IMAGES[:1], [replace(truth, masks=None)], config=SMALL, recipe=recipe)
    with pytest.raises(ValueError, match="labels from 9 to 9; the network's classes are 1 to 5"):
        collate(IMAGES[:1], [replace(truth, labels=truth.labels * 0 + 9)], config=SMALL, recipe=recipe)
    with pytest.raises(ValueError, match="6 boxes but 5 keypoints"):
        replace(truth, keypoints=torch.zeros(5, 17, 3))
    with pytest.raises(ValueError, match="a ground truth for each image, got 2 and 1"):
        collate(IMAGES, [truth], config=SMALL, recipe=recipe)


def test_a_batch_by_hand() -> None:
    # 96 × 128 stays, 80 × 120 grows to 85 × 128 (96 / 80 would make 144 wide): the input is 96 × 128
    boxes = torch.tensor([[12.0, 8.0, 60.0, 40.0]])
    small = GroundTruth(boxes=boxes, labels=torch.tensor([2]), masks=torch.ones(1, 80, 120, dtype=torch.uint8))
    batch = collate(IMAGES, [replace(NOTHING, crowd_boxes=boxes), small], config=SMALL, recipe=Recipe())
    assert batch.pixels.shape == (2, 3, 96, 128)
    assert batch.image_sizes.tolist() == [[96.0, 128.0], [85.0, 128.0]]
    assert batch.gt_valid.tolist() == [[False], [True]]
    expected = [12 * 128 / 120, 8 * 85 / 80, 60 * 128 / 120, 40 * 85 / 80]
    torch.testing.assert_close(batch.gt_boxes[1, 0], torch.tensor(expected))
    assert batch.gt_labels.tolist() == [[0], [2]]
    assert batch.crowd_valid.tolist() == [[True], [False]]
    assert isinstance(batch.masks, list)
    assert [tuple(torch.as_tensor(masks).shape) for masks in batch.masks] == [(0, 96, 128), (1, 85, 128)]


def test_sizes_and_padding_may_be_given() -> None:
    truths = [NOTHING, replace(NOTHING, masks=torch.zeros(0, 80, 120, dtype=torch.uint8))]
    to_sizes = [ImageSize(50, 70), ImageSize(40, 33)]
    batch = collate(IMAGES, truths, config=SMALL, recipe=Recipe(), to_sizes=to_sizes)
    assert batch.pixels.shape == (2, 3, 64, 96)
    assert batch.image_sizes.tolist() == [[50.0, 70.0], [40.0, 33.0]]
    wider = collate(IMAGES, truths, config=SMALL, recipe=Recipe(), to_sizes=to_sizes, padded=ImageSize(50, 130))
    assert wider.pixels.shape == (2, 3, 64, 160)
    assert torch.equal(wider.pixels[..., :96], batch.pixels)
    square = collate(IMAGES, truths, config=replace(SMALL, square=True), recipe=Recipe(), to_sizes=to_sizes)
    assert square.pixels.shape == (2, 3, 128, 128)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, mask_classes="softmax"),
        replace(SMALL, mask_head="none", num_keypoints=3, keypoint_convs=1, keypoint_channels=16),
    ],
)
def test_the_mean_over_workers_is_the_loss_of_all_images(config: ModelConfig) -> None:
    truths = [objects(image, seed=seed, num_classes=6) for seed, image in enumerate(IMAGES)]
    truths = [replace(truth, keypoints=_centers(truth.boxes)[:, None].repeat(1, 3, 1)) for truth in truths]
    seeds = [11, 12]
    forward = forward_of(config)

    def losses_of_part(images: list[int], divisor: Divisor) -> dict[str, Tensor]:
        forward.divisor = divisor
        chosen = [truths[index] for index in images], [seeds[index] for index in images]
        batch = collate(
            [IMAGES[index] for index in images],
            chosen[0],
            config=config,
            recipe=forward.recipe,
            padded=ImageSize(96, 128),
            seeds=chosen[1],
        )
        found: dict[str, Tensor] = forward(batch)
        return found

    together = losses_of_part([0, 1], own_count)
    counts: list[list[Tensor]] = [[], []]
    for index in range(2):
        losses_of_part([index], partial(_kept, counts[index]))
    means = [
        torch.stack(pair).sum().clamp(min=1) / 2 for pair in zip(*counts, strict=True)
    ]  # what all workers would agree on
    parts = []
    for index in range(2):
        agreed = iter(means)
        parts.append(losses_of_part([index], partial(_agreed, agreed)))
    for name, value in together.items():
        assert value > 0
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value, rtol=1e-5, atol=1e-7)


def _centers(boxes: Tensor) -> Tensor:
    """(G, 3) points that are seen."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, torch.full((len(boxes), 1), 2.0)], dim=1)


def _kept(counts: list[Tensor], count: Tensor) -> Tensor:
    counts.append(count)
    return own_count(count)


def _agreed(means: Iterator[Tensor], _count: Tensor) -> Tensor:
    return next(means)

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import model
from jobs.torchvision_peer import predict, torchvision_network
from model import Detections, ImageSize, MaskRCNN
from model.rle import decode
from tests.model.conftest import coco_paths, drawn_image, read_image
from tests.reference.parity import Difference, compare

FEW = 10
"""Detections in an image of some 20,000 pixels that are enough to compare; photographs have more than drawn ones."""

needs_coco = pytest.mark.skipif(not coco_paths(), reason="coco100 is not beside the repository: set MASKLINE_DATA")


def _loaded(network: nn.Module) -> MaskRCNN:
    """Ours from what torchvision would have saved."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return model.load(file.getvalue())


def _changed(net: MaskRCNN, **changes: Any) -> MaskRCNN:
    """The same weights, run otherwise."""
    names = ("config", "recipe", "categories", "name", "sha256")
    return MaskRCNN(net.network, **{**{name: getattr(net, name) for name in names}, **changes})


@pytest.mark.parametrize(
    "version", ["v1", "v2", "faster v1", "faster v2", pytest.param("keypoint", marks=pytest.mark.slow)]
)
def test_agrees_with_torchvision_on_small_inputs(version: str) -> None:
    images = [read_image(path) for path in coco_paths()[:2]] or [drawn_image(120, 180), drawn_image(150, 110)]
    theirs = torchvision_network(version, images[0], min_size=160, max_size=256, proposals=200)
    loaded = _loaded(theirs)
    config = replace(loaded.config, min_size=160, max_size=256)
    recipe = replace(loaded.recipe, rpn_post_nms=200)
    exact, folded = (_changed(loaded, config=config, recipe=recipe, exact=exact) for exact in (True, False))
    for image in images:
        expected = predict(theirs, image)
        assert len(expected["labels"]) >= FEW
        difference = compare(exact.predict([image])[0], expected)
        assert difference.is_within()
        assert (difference.box, difference.score) == (0.0, 0.0)
        rounded = compare(folded.predict([image])[0], expected)
        assert rounded.count + rounded.unmatched <= 3  # decisions so close that rounding tips them


@pytest.mark.slow
@needs_coco
@pytest.mark.parametrize("version", ["v1", "v1-batch-norm", "v2", "faster v1", "faster v2", "keypoint"])
def test_agrees_with_torchvision_on_every_image(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    count = int(os.environ.get("MASKLINE_PARITY_IMAGES", "100"))
    images = {path.name: read_image(path) for path in coco_paths()[:count]}
    theirs = torchvision_network(version, next(iter(images.values())))
    folded = _loaded(theirs)
    exact = _changed(folded, config=folded.config, recipe=folded.recipe, exact=True)
    worst, outside = Difference(), {}
    for name, image in images.items():
        expected = predict(theirs, image)
        assert len(expected["labels"]) == 100, name
        difference = compare(exact.predict([image])[0], expected)
        worst = worst.worst(difference)
        if not difference.is_within():
            outside[name] = difference
        # A corner that rounding takes over a whole pixel moves the pasted mask; boxes and scores have no such steps.
        rounded = compare(folded.predict([image])[0], expected)
        assert rounded.count + rounded.unmatched <= 3, name
        assert rounded.box <= 0.01, name
        assert rounded.score <= 1e-4, name
    with capsys.disabled():
        sys.stdout.write(f"\n{version}: {len(images)} images, {len(outside)} outside the tolerances, worst {worst}\n")
    assert not outside


@pytest.mark.slow
@needs_coco
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_eight_together_are_eight_alone(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = [read_image(path) for path in coco_paths()]
    net = _loaded(torchvision_network(version, images[0]))
    groups: dict[ImageSize, list[NDArray[np.uint8]]] = {}
    for image in images:
        groups.setdefault(net.padded_size(ImageSize(*image.shape[:2])), []).append(image)
    worst = Difference()
    for group in groups.values():
        for start in range(0, len(group) - 7, 8):
            batch = group[start : start + 8]
            for image, together in zip(batch, net.encode(net.detect(batch)), strict=True):
                (alone,) = net.predict([image])
                worst = worst.worst(_between(alone, together))
    with capsys.disabled():
        sys.stdout.write(f"\n{version}: batches of 8, worst {worst}\n")
    assert worst.is_within()


def _between(one: Detections, other: Detections) -> Difference:
    """As if the other were torchvision's, its masks certain."""
    masks = np.array([decode(mask) for mask in other.masks], dtype=np.float32).reshape(-1, 1, *other.size)
    answer = {"boxes": other.boxes, "labels": other.category_ids, "scores": other.scores, "masks": masks}
    return compare(one, {name: torch.from_numpy(values) for name, values in answer.items()})


def test_batches_of_one_padded_size_are_images_alone(small_net: MaskRCNN) -> None:
    sizes = [(120, 160), (118, 160), (160, 119), (240, 320), (121, 160), (160, 120), (300, 400), (120, 159)]
    images = [drawn_image(*size, seed=seed) for seed, size in enumerate(sizes)]
    groups = {small_net.padded_size(ImageSize(*size)) for size in sizes}
    assert len(groups) == 2
    for padded in groups:
        batch = [image for image in images if small_net.padded_size(ImageSize(*image.shape[:2])) == padded]
        raw = small_net.detect(batch)
        for image, together in zip(batch, small_net.encode(raw), strict=True):
            (alone,) = small_net.predict([image])
            difference = _between(alone, together)
            assert (difference.count, difference.unmatched) == (0, 0)
            assert difference.mask_pixels <= 2  # that lie on the threshold


def test_predict_keeps_the_order_of_images(small_net: MaskRCNN) -> None:
    small_net.batch_size, before = 2, small_net.batch_size
    images = [drawn_image(*size, seed=seed) for seed, size in enumerate([(90, 160), (160, 90), (92, 160), (160, 160)])]
    found = small_net.predict(images)
    small_net.batch_size = before
    assert [detections.size for detections in found] == [image.shape[:2] for image in images]
    assert small_net.predict([]) == []


def test_detections_are_what_they_say(small_net: MaskRCNN) -> None:
    image = drawn_image(200, 300)
    (found,) = small_net.predict([image], score_threshold=0.3)
    assert 0 < len(found) <= 100
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert (np.diff(found.scores) <= 0).all()
    assert (found.scores > 0.3).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= np.array([300, 200, 300, 200], dtype=np.float32) * (1 + 1e-6)).all()
    assert set(found.category_ids) <= {1, 2, 3, 4}
    assert found.categories == [small_net.categories[label] for label in found.category_ids]
    for mask, area in zip(found.masks, found.areas, strict=True):
        assert mask["size"] == [200, 300]
        assert decode(mask).sum() == area


def test_a_higher_threshold_drops_detections_before_nms(small_net: MaskRCNN) -> None:
    image = drawn_image(200, 300)
    (low,), (high,) = small_net.predict([image], 0.3), small_net.predict([image], 0.6)
    above = low.scores > 0.6
    assert np.array_equal(low.boxes[above], high.boxes)
    raw = small_net.detect([image], 0.3)
    (filtered,) = small_net.encode(raw, 0.6)
    assert np.array_equal(filtered.scores, high.scores)


def test_nothing_found_is_an_empty_answer(small_net: MaskRCNN) -> None:
    found = small_net.predict([drawn_image(100, 150), drawn_image(150, 100)], score_threshold=1.0)
    for detections in found:
        assert len(detections) == 0
        assert detections.boxes.shape == (0, 4)
        assert (detections.masks, detections.categories, len(detections.areas)) == ([], [], 0)


def test_places_that_are_not_filled_hold_zeros(small_net: MaskRCNN) -> None:
    raw = small_net.detect([drawn_image(100, 150)], score_threshold=0.9)
    assert raw.boxes.shape == (1, 100, 4)
    assert raw.mask_logits is not None
    assert raw.mask_logits.shape == (1, 100, 28, 28)
    empty = ~raw.valid[0]
    assert empty.any()
    for values in (raw.boxes, raw.scores, raw.labels, raw.mask_logits):
        assert not values[0, empty].any()


def test_tiny_and_thin_images_are_detected(small_net: MaskRCNN) -> None:
    for shape in ((1, 1, 3), (1, 700, 3), (900, 2, 3)):
        (found,) = small_net.predict([np.full(shape, 128, dtype=np.uint8)])
        assert found.size == shape[:2]


def test_bf16_keeps_boxes_and_scores_in_float32(small_net: MaskRCNN) -> None:
    image = drawn_image(200, 300)
    half = _changed(small_net, precision="bf16")
    raw = half.detect([image])
    assert raw.mask_logits is not None
    assert {raw.boxes.dtype, raw.scores.dtype, raw.mask_logits.dtype} == {torch.float32}
    fraction = raw.boxes[raw.valid].remainder(1)
    assert len(set(fraction.flatten().tolist())) > 50  # coordinates rounded to bfloat16 would be whole above 128
    (exact,), (rounded,) = small_net.predict([image]), half.encode(raw)
    best = np.abs(rounded.boxes[:, None] - exact.boxes[None]).max(axis=2).min(axis=1)
    assert np.median(best) < 4


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((4, 4), dtype=np.uint8)], r"image 0 has shape \(4, 4\)"),
        ([np.zeros((4, 4, 4), dtype=np.uint8)], r"image 0 has shape \(4, 4, 4\)"),
        ([drawn_image(9, 9), np.zeros((0, 4, 3), dtype=np.uint8)], r"image 1 has shape \(0, 4, 3\).*one pixel"),
        ([np.zeros((4, 4, 3), dtype=np.float32)], "dtype float32; give uint8"),
        (["photo.jpg"], "image 0 is a str"),
    ],
)
def test_bad_images_are_refused_by_number(small_net: MaskRCNN, images: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_net.predict(images)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_bad_thresholds_are_refused(small_net: MaskRCNN, threshold: float) -> None:
    with pytest.raises(ValueError, match="score_threshold must be between 0 and 1"):
        small_net.predict([drawn_image(9, 9)], threshold)


def test_a_batch_of_several_padded_sizes_is_refused(small_net: MaskRCNN) -> None:
    with pytest.raises(ValueError, match="one padded size, got 2"):
        small_net.detect([drawn_image(100, 160), drawn_image(160, 100)])


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(small_net: MaskRCNN) -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    gpu = _changed(small_net, device="cuda")
    image = drawn_image(200, 300)
    difference = _between(small_net.predict([image])[0], gpu.predict([image])[0])
    torch.backends.cudnn.allow_tf32 = before
    assert (difference.count, difference.unmatched) == (0, 0)


def test_model_imports_where_ray_and_arrow_are_absent() -> None:
    script = (
        "import sys\n"
        "for name in ('ray', 'pyarrow', 'pipeline', 'jobs', 'fsspec'): sys.modules[name] = None\n"
        "import model, pkgutil, importlib\n"
        "for part in pkgutil.iter_modules(model.__path__): importlib.import_module('model.' + part.name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

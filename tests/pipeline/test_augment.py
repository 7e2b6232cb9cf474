"""Augmentation: by hand, on drawn scenes whose pixels name their instance, and there and back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco
from torch import Tensor

from model.ground_truth import GroundTruth
from model.structures import ImageSize, Rle
from model.transform import resized_size
from pipeline.augment import AugmentConfig, Geometry, Window, apply, draw_geometry
from pipeline.errors import ConfigError
from pipeline.scenes import draw_scene

PLAIN = AugmentConfig(flip=0.0)
SIZES = [ImageSize(60, 90), ImageSize(97, 64), ImageSize(72, 72)]
RULES: list[Literal["torchvision", "detectron2"]] = ["torchvision", "detectron2"]


def whole(size: ImageSize, *, flip: bool = False, turns: int = 0) -> Geometry:
    """Nothing cut, nothing resized."""
    turned = ImageSize(size.width, size.height) if turns % 2 else size
    return Geometry(flip=flip, turns=turns, window=Window(0, 0, *turned), to_size=turned)


def change(
    image: NDArray[np.uint8], truth: GroundTruth, geometry: Geometry, **options: Any
) -> tuple[NDArray[np.uint8], GroundTruth]:
    return apply(image, truth, geometry, config=PLAIN, rng=np.random.default_rng(0), **options)


def draw(size: ImageSize, config: AugmentConfig, seed: int, *, min_size: int = 80, max_size: int = 120) -> Geometry:
    rng = np.random.default_rng(seed)
    return draw_geometry(size, config=config, min_size=min_size, max_size=max_size, rule="torchvision", rng=rng)


def to_rles(bitmaps: Tensor) -> list[Rle]:
    return [coco.encode(np.asfortranarray(bitmap.numpy())) for bitmap in bitmaps]


def tight(bitmap: NDArray[Any]) -> list[int]:
    ys, xs = np.nonzero(bitmap)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


@cache
def scene(seed: int, size: ImageSize) -> tuple[NDArray[np.uint8], GroundTruth]:
    """A picture whose pixels hold 1 + the index of the instance seen there, which is also that instance's label."""
    masks = draw_scene(seed, size).masks
    owner = (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(axis=0).astype(np.uint8)  # (H, W)
    boxes = torch.tensor([tight(mask) for mask in masks], dtype=torch.float32)
    keypoints = torch.cat([boxes.view(-1, 2, 2), torch.full((len(boxes), 2, 1), 2.0)], dim=2)  # (G, 2, 3) the corners
    truth = GroundTruth(
        boxes=boxes,
        labels=torch.arange(1, len(masks) + 1),
        masks=torch.from_numpy(masks.astype(np.uint8)),
        keypoints=keypoints,
    )
    return np.repeat(owner[..., None], 3, axis=2), truth


def small() -> tuple[NDArray[np.uint8], GroundTruth]:
    """3 x 4 pixels numbered from 0; an L of three pixels at the upper left and one pixel at the lower right."""
    image = np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4, 1), 3, axis=2)
    masks = torch.tensor(
        [
            [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
            [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
        ],
        dtype=torch.uint8,
    )
    truth = GroundTruth(
        boxes=torch.tensor([[0.0, 0, 2, 2], [3, 2, 4, 3]]),
        labels=torch.tensor([1, 2]),
        masks=masks,
        keypoints=torch.tensor([[[0.5, 0.5, 2.0], [1.5, 1.5, 1]], [[3.5, 2.5, 2], [0, 0, 0]]]),
        crowd_boxes=torch.tensor([[1.0, 0, 3, 1]]),
        proposals=torch.tensor([[0.0, 0, 4, 3], [2, 1, 4, 3]]),
    )
    return image, truth


def test_mirrored_by_hand() -> None:
    image, truth = small()
    pixels, flipped = change(image, truth, whole(ImageSize(3, 4), flip=True), flip_pairs=((0, 1),))
    assert pixels[..., 0].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]
    assert flipped.boxes.tolist() == [[2, 0, 4, 2], [0, 2, 1, 3]]  # x becomes 4 - x
    assert isinstance(flipped.masks, Tensor)
    assert flipped.masks[0].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert flipped.keypoints is not None
    assert flipped.keypoints.tolist() == [[[2.5, 1.5, 1], [3.5, 0.5, 2]], [[0, 0, 0], [0.5, 2.5, 2]]]
    assert flipped.crowd_boxes is not None
    assert flipped.crowd_boxes.tolist() == [[1, 0, 3, 1]]
    assert flipped.proposals is not None
    assert flipped.proposals.tolist() == [[0, 0, 4, 3], [0, 1, 2, 3]]


def test_turned_by_hand() -> None:
    """Counter-clockwise: the right column becomes the upper row, and x, y become y, 4 - x."""
    image, truth = small()
    pixels, turned = change(image, truth, whole(ImageSize(3, 4), turns=1), flip_pairs=((0, 1),))
    assert pixels[..., 0].tolist() == [[3, 7, 11], [2, 6, 10], [1, 5, 9], [0, 4, 8]]
    assert turned.boxes.tolist() == [[0, 2, 2, 4], [2, 0, 3, 1]]
    assert isinstance(turned.masks, Tensor)
    assert turned.masks[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert turned.keypoints is not None
    assert turned.keypoints.tolist() == [[[0.5, 3.5, 2], [1.5, 2.5, 1]], [[2.5, 0.5, 2], [0, 0, 0]]]  # sides stay


def test_cut_by_hand() -> None:
    """The lower right 2 x 3 pixels: of the L only its foot is left, and the box shrinks to it."""
    image, truth = small()
    geometry = Geometry(flip=False, turns=0, window=Window(1, 1, 3, 4), to_size=ImageSize(2, 3))
    pixels, cut = change(image, truth, geometry)
    assert pixels[..., 0].tolist() == [[5, 6, 7], [9, 10, 11]]
    assert cut.boxes.tolist() == [[0, 0, 1, 1], [2, 1, 3, 2]]
    assert isinstance(cut.masks, Tensor)
    assert cut.masks.tolist() == [[[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]]
    assert cut.keypoints is not None
    assert cut.keypoints.tolist() == [[[0, 0, 0], [0.5, 0.5, 1]], [[2.5, 1.5, 2], [0, 0, 0]]]
    assert cut.crowd_boxes is not None
    assert cut.crowd_boxes.tolist() == []  # it ends where the window begins
    assert cut.proposals is not None
    assert cut.proposals.tolist() == [[0, 0, 3, 2], [1, 0, 3, 2]]


def test_turned_mirrored_and_cut_in_that_order() -> None:
    image, truth = small()
    geometry = Geometry(flip=True, turns=1, window=Window(2, 1, 4, 3), to_size=ImageSize(2, 2))
    pixels, changed = change(image, truth, geometry)
    assert pixels[..., 0].tolist() == [[5, 1], [4, 0]]  # of rows 11 7 3, 10 6 2, 9 5 1, 8 4 0
    assert changed.labels.tolist() == [1]
    assert isinstance(changed.masks, Tensor)
    assert changed.masks.tolist() == [[[1, 0], [1, 1]]]
    assert changed.boxes.tolist() == [[0, 0, 2, 2]]


def test_without_masks_boxes_are_clipped_and_slivers_dropped() -> None:
    boxes = torch.tensor([[2.0, 2, 20, 8], [9.5, 0, 30, 10], [4.25, 4, 4.75, 9], [15, 2, 18, 8]])
    truth = GroundTruth(boxes=boxes, labels=torch.arange(1, 5), keypoints=torch.ones(4, 1, 3))
    geometry = Geometry(flip=False, turns=0, window=Window(0, 0, 10, 10), to_size=ImageSize(10, 10))
    _, cut = change(np.zeros((10, 40, 3), np.uint8), truth, geometry)
    # half a pixel is left of the second; the third was never wider; the last lies beyond
    assert cut.boxes.tolist() == [[2, 2, 10, 8], [4.25, 4, 4.75, 9]]
    assert cut.labels.tolist() == [1, 3]
    assert cut.keypoints is not None
    assert cut.keypoints.shape == (2, 1, 3)
    assert cut.masks is None


def test_an_object_whose_mask_is_cut_off_goes_though_its_box_remains() -> None:
    image, truth = small()
    truth = replace(truth, boxes=torch.tensor([[0.0, 0, 4, 3], [0, 0, 4, 3]]))
    geometry = Geometry(flip=False, turns=0, window=Window(0, 2, 3, 4), to_size=ImageSize(3, 2))
    _, cut = change(image, truth, geometry)
    assert cut.labels.tolist() == [2]
    assert cut.boxes.tolist() == [[1, 2, 2, 3]]
    assert isinstance(cut.masks, Tensor)
    assert cut.masks.shape == (1, 3, 2)


def test_boxes_that_nothing_cuts_keep_their_fractions() -> None:
    image, truth = small()
    truth = replace(truth, boxes=torch.tensor([[0.25, 0.5, 1.75, 1.625], [-0.5, 2, 4.5, 2.5]]))
    _, flipped = change(image, truth, whole(ImageSize(3, 4), flip=True))
    assert flipped.boxes.tolist() == [[2.25, 0.5, 3.75, 1.625], [-0.5, 2, 4.5, 2.5]]


configs = st.builds(
    AugmentConfig,
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    quarter_turns=st.booleans(),
    min_sizes=st.sampled_from([(), (40,), (50, 77, 120)]),
    scales=st.sampled_from([(1.0, 1.0), (0.1, 2.0), (1.5, 1.5)]),
    crop=st.sampled_from([None, 1, 33, 64, 500]),
)


@given(config=configs, seed=st.integers(0, 2**32), number=st.integers(0, 3), size=st.sampled_from(SIZES))
@settings(deadline=None, max_examples=150)
def test_masks_and_boxes_keep_to_the_pixels_of_their_instance(
    config: AugmentConfig, seed: int, number: int, size: ImageSize
) -> None:
    image, truth = scene(number, size)
    geometry = draw(size, config, seed)
    pixels, changed = change(image, truth, geometry)
    y1, x1, y2, x2 = geometry.window
    assert pixels.shape == (y2 - y1, x2 - x1, 3)
    assert pixels.flags.c_contiguous
    assert isinstance(changed.masks, Tensor)
    assert changed.masks.shape == (len(changed.boxes), y2 - y1, x2 - x1)
    assert changed.masks.dtype == torch.uint8
    # Whoever is seen in the window is there, with just the pixels that name it, and nobody else.
    assert changed.labels.tolist() == [label for label in np.unique(pixels).tolist() if label > 0]
    assert changed.keypoints is not None
    for label, mask, box, corners in zip(
        changed.labels.tolist(), changed.masks.numpy(), changed.boxes, changed.keypoints, strict=True
    ):
        assert np.array_equal(mask > 0, pixels[..., 0] == label)
        assert box.tolist() == tight(mask)  # the scene's boxes are tight, so those that nothing cuts are too
        inside = corners[corners[:, 2] > 0, :2]
        assert bool(((inside >= 0) & (inside <= torch.tensor([x2 - x1, y2 - y1]))).all())
        assert bool((corners[corners[:, 2] == 0] == 0).all())


@given(config=configs, seed=st.integers(0, 2**32), number=st.integers(0, 3), size=st.sampled_from(SIZES))
@settings(deadline=None, max_examples=40)
def test_run_lengths_give_what_bitmaps_give(config: AugmentConfig, seed: int, number: int, size: ImageSize) -> None:
    image, truth = scene(number, size)
    assert isinstance(truth.masks, Tensor)
    geometry = draw(size, config, seed)
    _, from_bitmaps = change(image, truth, geometry)
    _, from_rles = change(image, replace(truth, masks=to_rles(truth.masks)), geometry)
    assert_same_truth(from_bitmaps, from_rles)


def assert_same_truth(one: GroundTruth, other: GroundTruth) -> None:
    for name in ("boxes", "labels", "masks", "keypoints"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("repeats", "options"), [(2, {"flip": True}), (4, {"turns": 1}), (2, {"turns": 2})])
def test_mirrored_twice_or_turned_around_it_is_as_before(
    repeats: int, options: dict[str, Any], size: ImageSize
) -> None:
    image, truth = scene(1, size)
    pixels, changed = image, truth
    for step in range(repeats):
        geometry = whole(ImageSize(*pixels.shape[:2]), **options)
        pixels, changed = change(pixels, changed, geometry, flip_pairs=((0, 1),))
        assert np.array_equal(pixels, image) == (step == repeats - 1)
    assert_same_truth(changed, truth)


def test_without_objects_there_are_none_after() -> None:
    geometry = Geometry(flip=True, turns=3, window=Window(1, 0, 5, 4), to_size=ImageSize(4, 4))
    empty: Sequence[Tensor | list[Rle]] = ([], torch.zeros(0, 4, 6, dtype=torch.uint8))
    for masks in empty:
        truth = GroundTruth(
            boxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            masks=masks,
            keypoints=torch.zeros(0, 17, 3),
            crowd_boxes=torch.zeros(0, 4),
            proposals=torch.zeros(0, 4),
        )
        pixels, changed = change(np.zeros((4, 6, 3), np.uint8), truth, geometry)
        assert pixels.shape == (4, 4, 3)
        assert isinstance(changed.masks, Tensor)
        assert changed.masks.shape == (0, 4, 4)
        assert changed.boxes.shape == (0, 4)
        assert changed.keypoints is not None
        assert changed.keypoints.shape == (0, 17, 3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("crop", [None, 5000])
def test_a_window_larger_than_the_image_cuts_nothing(
    rule: Literal["torchvision", "detectron2"], crop: int | None
) -> None:
    size = ImageSize(333, 500)
    config = AugmentConfig(crop=crop)
    rng = np.random.default_rng(0)
    geometry = draw_geometry(size, config=config, min_size=800, max_size=1333, rule=rule, rng=rng)
    assert geometry.window == (0, 0, 333, 500)
    assert geometry.to_size == resized_size(size, min_size=800, max_size=1333, rule=rule)


def test_a_window_by_hand() -> None:
    """60 x 90 to the short side 120, times a half again: 180 x 270. A window of 90 there is one of 30 here."""
    config = AugmentConfig(scales=(1.5, 1.5), crop=90)
    seen = set()
    for seed in range(400):
        geometry = draw(ImageSize(60, 90), config, seed, min_size=120, max_size=1000)
        y1, x1, y2, x2 = geometry.window
        assert (y2 - y1, x2 - x1) == (30, 30)
        assert 0 <= y1 <= 60 - 30
        assert 0 <= x1 <= 90 - 30
        assert geometry.to_size == (90, 90)
        seen.add(x1)
    assert {0, 60} <= seen  # at either edge


def test_a_side_that_fits_is_not_cut() -> None:
    geometry = draw(ImageSize(50, 200), AugmentConfig(crop=100), 0, min_size=50, max_size=1000)
    y1, x1, y2, x2 = geometry.window
    assert (y1, y2, x2 - x1) == (0, 50, 100)
    assert geometry.to_size == (50, 100)


def test_large_scale_jitter_draws_evenly_between_its_bounds() -> None:
    config = AugmentConfig(scales=(0.1, 2.0), crop=1024)
    uncut = replace(config, crop=None)
    rng = np.random.default_rng(0)
    factors = []
    for seed in range(2000):
        size = ImageSize(int(rng.integers(300, 700)), int(rng.integers(300, 700)))
        resized = resized_size(size, min_size=1024, max_size=1024)
        free, cropped = (draw(size, one, seed, min_size=1024, max_size=1024) for one in (uncut, config))
        factors.append(max(free.to_size) / max(resized))
        assert cropped.to_size == tuple(min(1024, side) for side in free.to_size)
        y1, x1, y2, x2 = cropped.window
        assert 0 <= y1 < y2 <= size.height
        assert 0 <= x1 < x2 <= size.width
        for inside, length, side in ((y2 - y1, size.height, free.to_size[0]), (x2 - x1, size.width, free.to_size[1])):
            assert abs(inside - length * min(1, 1024 / side)) <= 0.5  # whole pixels
    assert 0.099 <= min(factors) < 0.11
    assert 1.99 < max(factors) <= 2.001
    assert np.mean(factors) == pytest.approx(1.05, abs=4 * 1.9 / np.sqrt(12 * 2000))


def test_sides_turns_and_mirrors_are_drawn_as_often_as_asked() -> None:
    config = AugmentConfig(flip=0.25, quarter_turns=True, min_sizes=(40, 60, 80))
    size = ImageSize(20, 30)
    drawn = [draw(size, config, seed, max_size=1000) for seed in range(2000)]
    assert np.mean([one.flip for one in drawn]) == pytest.approx(0.25, abs=0.04)
    for turns in range(4):
        assert np.mean([one.turns == turns for one in drawn]) == pytest.approx(0.25, abs=0.04)
    for side in config.min_sizes:
        assert np.mean([min(one.to_size) == side for one in drawn]) == pytest.approx(1 / 3, abs=0.05)
    assert all((one.to_size.height > one.to_size.width) == (one.turns % 2 == 1) for one in drawn)


def test_one_part_of_the_config_leaves_what_the_others_draw() -> None:
    for seed in range(50):
        plain = draw(SIZES[0], AugmentConfig(), seed)
        cropped = draw(SIZES[0], AugmentConfig(quarter_turns=True, crop=40, scales=(0.5, 2.0)), seed)
        assert plain.flip == cropped.flip


def colours(config: AugmentConfig, seed: int) -> NDArray[np.uint8]:
    image = np.random.default_rng(9).integers(60, 190, (8, 9, 3)).astype(np.uint8)
    image.flags.writeable = False  # as a decoder may give it
    truth = GroundTruth(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return apply(image, truth, whole(ImageSize(8, 9)), config=config, rng=np.random.default_rng(seed))[0]


def test_colours_change_only_when_asked_and_alike_for_a_seed() -> None:
    plain = colours(PLAIN, 0)
    assert np.array_equal(plain, np.random.default_rng(9).integers(60, 190, (8, 9, 3)))
    for name in ("brightness", "contrast", "saturation", "hue"):
        options: dict[str, Any] = {name: 0.4}
        config = replace(PLAIN, **options)
        assert np.array_equal(colours(config, 1), colours(config, 1)), name
        assert not np.array_equal(colours(config, 1), colours(config, 2)), name
        assert not np.array_equal(colours(config, 1), plain), name
        assert (colours(config, 1).shape, colours(config, 1).dtype) == (plain.shape, plain.dtype)


def test_brightness_is_a_factor_within_its_bounds() -> None:
    plain = colours(PLAIN, 0).astype(np.float64)
    factors = [(colours(replace(PLAIN, brightness=0.3), seed) / plain).mean() for seed in range(60)]
    assert 0.68 < min(factors) < 0.8  # rounding down takes up to 1/60
    assert 1.2 < max(factors) <= 1.3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip": 1.5}, "flip must be from 0 to 1, got 1.5"),
        ({"flip": float("nan")}, "flip must be from 0 to 1, got nan"),
        ({"min_sizes": (640, 0)}, r"min_sizes must be at least 1 each, got \(640, 0\)"),
        ({"scales": (2.0, 0.1)}, r"scales must be two factors above 0, the lower first, got \(2.0, 0.1\)"),
        ({"scales": (0.0, 1.0)}, r"scales must be .* got \(0.0, 1.0\)"),
        ({"crop": 0}, "crop must be at least 1, got 0"),
        ({"brightness": -0.1}, "brightness must be at least 0 and finite, got -0.1"),
        ({"contrast": float("inf")}, "contrast must be at least 0 and finite, got inf"),
        ({"saturation": -1.0}, "saturation must be at least 0 and finite, got -1.0"),
        ({"hue": 0.6}, "hue must be from 0 to 0.5, got 0.6"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        AugmentConfig(**values)


def test_what_does_not_fit_the_image_is_refused() -> None:
    image, truth = small()
    with pytest.raises(ConfigError, match="does not hold"):
        change(image, truth, whole(ImageSize(3, 5)))
    with pytest.raises(ConfigError, match=r"masks must have the size of their image .*, got \(4, 3\)"):
        change(image, replace(truth, masks=torch.zeros(2, 4, 3, dtype=torch.uint8)), whole(ImageSize(3, 4)))
    outline = [np.array([[0.0, 0], [2, 0], [2, 2]])]
    with pytest.raises(ConfigError, match="draw polygons first"):
        change(image, replace(truth, masks=[outline, outline]), whole(ImageSize(3, 4)))

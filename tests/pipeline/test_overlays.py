"""Overlays: tint, outline and untouched surroundings, worked by hand; sheets that hold every image."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.structures import Rle
from pipeline.overlays import _FILL, contact_sheet, draw_overlay, instance_colour

NO_BOXES = np.zeros((0, 4), dtype=np.float32)


def rle_of(height: int, width: int, rows: slice, columns: slice) -> Rle:
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[rows, columns] = 1
    encoded: Rle = coco_mask.encode(mask)
    return encoded


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def test_a_mask_is_tinted_and_outlined_and_the_rest_untouched() -> None:
    image = grey(100, 120)
    before = image.copy()
    box = np.array([[30, 40, 90, 80]], dtype=np.float32)
    drawn = draw_overlay(
        image, boxes=box, labels=["cat"], scores=[0.9], masks=[rle_of(100, 120, slice(45, 75), slice(35, 85))]
    )
    colour = np.array(instance_colour(0))
    assert np.array_equal(image, before)
    assert (drawn.shape, drawn.dtype) == (image.shape, image.dtype)
    assert drawn[60, 60].tolist() == np.rint(100 + _FILL * (colour - 100)).tolist()
    for row, column in ((45, 60), (74, 60), (60, 35), (60, 84)):  # the mask's rim
        assert drawn[row, column].tolist() == colour.tolist()
    for row, column in ((40, 100 - 11), (79, 60), (60, 30)):  # the box, whose last pixel lies within x2, y2
        assert drawn[row, column].tolist() == colour.tolist()
    assert (drawn[81:] == 100).all()
    assert (drawn[:, :29] == 100).all()
    assert (drawn[:, 95:] == 100).all()
    assert (drawn[25:40, 32:60] != 100).any()  # the label, above the box


def test_nothing_found_leaves_the_image() -> None:
    image = grey(20, 30)
    drawn = draw_overlay(image, boxes=NO_BOXES, labels=[], scores=[], masks=[])
    assert np.array_equal(drawn, image)
    assert drawn is not image


def test_boxes_without_masks_and_empty_masks_are_drawn() -> None:
    box = np.array([[2.4, 3.6, 40.2, 50.0]], dtype=np.float32)
    plain = draw_overlay(grey(60, 60), boxes=box, labels=["a"], scores=[1.0], masks=[])
    empty = rle_of(60, 60, slice(0, 0), slice(0, 0))
    assert np.array_equal(plain, draw_overlay(grey(60, 60), boxes=box, labels=["a"], scores=[1.0], masks=[empty]))
    assert (plain != 100).any()


def test_the_best_detection_lies_on_top() -> None:
    boxes = np.array([[10, 10, 50, 50], [10, 10, 50, 50]], dtype=np.float32)
    mask = rle_of(60, 60, slice(10, 50), slice(10, 50))
    drawn = draw_overlay(grey(60, 60), boxes=boxes, labels=["a", "b"], scores=[0.9, 0.2], masks=[mask, mask])
    assert drawn[30, 49].tolist() == list(instance_colour(0))


def test_a_hundred_detections_and_tiny_images_are_drawn() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 80, (100, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 40, (100, 2))], axis=1).astype(np.float32)
    drawn = draw_overlay(
        grey(90, 90), boxes=boxes, labels=["category"] * 100, scores=rng.random(100).tolist(), masks=[]
    )
    assert drawn.shape == (90, 90, 3)
    tiny = draw_overlay(grey(8, 9), boxes=boxes[:3], labels=["a long name"] * 3, scores=[1, 1, 1], masks=[])
    assert tiny.shape == (8, 9, 3)


def test_a_label_is_left_out_where_it_would_hide_more_than_its_box_shows() -> None:
    image = np.zeros((200, 200, 3), np.uint8)

    def drawn(side: int) -> int:
        boxes = np.array([[80, 80, 80 + side, 80 + side]], np.float32)
        found = draw_overlay(image, boxes=boxes, labels=["nucleus"], scores=[0.9], masks=[])
        found[80 : 80 + side, 80 : 80 + side] = 0
        return int(found.any(axis=2).sum())

    assert drawn(12) == 0
    assert drawn(60) > 100


def test_colours_of_a_scene_are_distinct() -> None:
    colours = [np.array(instance_colour(rank)) for rank in range(8)]
    assert min(np.abs(one - two).sum() for one, two in combinations(colours, 2)) > 60


def test_a_sheet_holds_every_image() -> None:
    greys = [np.full((height, width, 3), level, dtype=np.uint8) for height, width, level in _SPECIMENS]
    sheet = contact_sheet(greys, 2, width=400, gap=4)
    assert sheet.shape[1] == 400
    assert {level for _, _, level in _SPECIMENS} <= set(np.unique(sheet).tolist())
    assert (sheet[:4] == 255).all()
    assert (sheet[-4:] == 255).all()
    # One row of a 1:2 and a 1:1 image in 400 - 3 · 4 px: as high as 388 / (2 + 1).
    assert contact_sheet(greys[:2], 2, width=400, gap=4).shape == (round(388 / 3) + 8, 400, 3)


_SPECIMENS = [(50, 100, 10), (80, 80, 60), (120, 60, 110), (40, 90, 160), (70, 70, 210)]


def test_a_sheet_needs_images_and_columns() -> None:
    with pytest.raises(ValueError, match="needs images"):
        contact_sheet([], 3)
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet([grey(4, 4)], 0)

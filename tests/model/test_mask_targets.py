"""Mask targets against loops, against torchvision and pycocotools, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.models.detection.transform import _resize_image_and_masks
from torchvision.ops import roi_align

from model import mask_targets
from model.mask_targets import Polygons, crop, flipped, resized, to_bitmaps
from model.structures import ImageSize, Rle
from tests.reference import polygons as reference
from tests.reference import roi_align as roi_reference

SIZE = ImageSize(60, 80)
FIRST = torch.zeros(1, dtype=torch.int64)


def random_bitmaps(seed: int, num_instances: int = 4) -> Tensor:
    """Blobs with holes and edges that no straight line follows."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_instances, 1, 8, 10, generator=random)
    return (torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")[:, 0] > 0.5).to(torch.uint8)


def random_boxes(seed: int, num_regions: int, num_instances: int) -> tuple[Tensor, Tensor]:
    """Boxes of all sizes, some beyond the image, one without extent, and the instance of each."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_regions, 2, generator=random) * 70 - 10
    boxes = torch.cat([corner, corner + torch.rand(num_regions, 2, generator=random) ** 2 * 80 + 0.2], dim=1)
    boxes[-1, 2:] = boxes[-1, :2]
    return boxes, torch.randint(num_instances, (num_regions,), generator=random)


def random_polygons(seed: int, num_instances: int = 4) -> list[list[NDArray[np.float64]]]:
    """One to three parts each, of three to nine points around a centre, most of them crossing themselves."""
    random = np.random.default_rng(seed)
    return [
        [
            random.uniform(10, 50, 2) + random.normal(0, 12, (random.integers(3, 10), 2))
            for _ in range(random.integers(1, 4))
        ]
        for _ in range(num_instances)
    ]


def to_rles(bitmaps: Tensor) -> list[Rle]:
    return [coco.encode(np.asfortranarray(bitmap.numpy())) for bitmap in bitmaps]


def rectangle(x1: float, y1: float, x2: float, y2: float) -> NDArray[np.float64]:
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])


def test_both_rules_of_bitmaps_by_hand() -> None:
    # The right half of 8 columns is set; two columns of cells of a box over all of it, 4 samples to each at columns
    # 0.5, 1.5, ... of torchvision's count, which puts pixel p at p, so that 3.5 reads a half; detectron2's is half a
    # pixel less and reads pixels as they are.
    bitmap = torch.zeros(1, 4, 8, dtype=torch.uint8)
    bitmap[:, :, 4:] = 1
    box = torch.tensor([[0.0, 0, 8, 4]])
    assert crop(bitmap, FIRST, box, side=2, target="soft").tolist() == [[[0.5 / 4, 1]] * 2]
    assert crop(bitmap, FIRST, box, side=2, target="binary").tolist() == [[[0, 1]] * 2]
    # Two columns to the left, the second cell reads at 2.5, 3.5, 4.5, 5.5: 0, a half, 1, 1; and half a pixel less,
    # 0, 0, 1, 1, whose half is enough.
    box = torch.tensor([[-2.0, 0, 6, 4]])
    assert crop(bitmap, FIRST, box, side=2, target="soft")[0, 0].tolist() == [0, 2.5 / 4]
    assert crop(bitmap, FIRST, box, side=2, target="binary")[0, 0].tolist() == [0, 1]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([1, 7, 28]))
def test_soft_targets_are_torchvisions(seed: int, side: int) -> None:
    bitmaps, (boxes, gt_index) = random_bitmaps(seed), random_boxes(seed, 9, 4)
    expected = project_masks_on_boxes(bitmaps, boxes, gt_index, side)
    assert torch.equal(crop(bitmaps, gt_index, boxes, side=side, target="soft"), expected)
    assert torch.equal(crop(bitmaps.bool(), gt_index, boxes, side=side, target="soft"), expected)
    assert torch.equal(crop(to_rles(bitmaps), gt_index, boxes, side=side, target="soft"), expected)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([1, 7, 28]))
def test_binary_targets_are_detectron2s(seed: int, side: int) -> None:
    bitmaps, (boxes, gt_index) = random_bitmaps(seed), random_boxes(seed, 9, 4)
    rois = torch.cat([torch.arange(len(boxes))[:, None], boxes], dim=1)
    # BitMasks.crop_and_resize (structures/masks.py), of the instances each box is matched to
    expected = roi_align(bitmaps[gt_index][:, None].float(), rois, (side, side), 1.0, 0, True)[:, 0] >= 0.5
    assert torch.equal(crop(bitmaps, gt_index, boxes, side=side, target="binary"), expected.float())
    assert torch.equal(crop(to_rles(bitmaps), gt_index, boxes, side=side, target="binary"), expected.float())


@pytest.mark.parametrize(("target", "aligned"), [("soft", False), ("binary", True)])
def test_bitmaps_agree_with_the_loop(target: mask_targets.MaskTarget, aligned: bool) -> None:
    bitmap = random_bitmaps(3, 1)
    for corner, extent in ((3.3, 16.5), (-5.0, 30.0), (40.2, 9.9)):
        box = torch.tensor([[corner, corner + 2, corner + extent, corner + 2 + extent]])
        found = crop(bitmap, FIRST, box, side=7, target=target)[0].numpy()
        # As many samples as a cell has pixels: 3, 5, 2.
        expected = roi_reference.roi_align(
            bitmap[0].double().numpy(),
            box[0].double().numpy(),
            1,
            output_size=7,
            sampling_ratio=math.ceil(extent / 7),
            aligned=aligned,
        )
        if target == "binary":
            assert (np.abs(expected - 0.5) > 1e-4).all()
            expected = (expected >= 0.5).astype(np.float64)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("target", ["soft", "binary"])
def test_instances_may_be_taken_a_few_at_a_time(
    target: mask_targets.MaskTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitmaps, (boxes, gt_index) = random_bitmaps(5, 7), random_boxes(5, 30, 7)
    whole = crop(bitmaps, gt_index, boxes, side=14, target=target)
    held: list[int] = []

    def watched(pixels: Tensor, *arguments: object, **keywords: object) -> Tensor:
        held.append(len(pixels))
        pooled: Tensor = roi_align(pixels, *arguments, **keywords)
        return pooled

    monkeypatch.setattr(mask_targets, "roi_align", watched)
    monkeypatch.setattr(mask_targets, "_CHUNK_PIXELS", 3 * SIZE.height * SIZE.width)
    assert torch.equal(crop(bitmaps, gt_index, boxes, side=14, target=target), whole)
    assert torch.equal(crop(to_rles(bitmaps), gt_index, boxes, side=14, target=target), whole)
    assert held == [3, 3, 1] * 2


def test_a_polygon_by_hand() -> None:
    # A box of 8 × 4 px and 4 × 4 cells of 2 × 1 with centres at x 11, 13, 15, 17 and y 20.5 ... 23.5. The rectangle's
    # left edge at 13 and upper at 21.5 take the centres on them, the right at 17 and the lower at 23.5 do not.
    box = torch.tensor([[10.0, 20, 18, 24]])
    found = crop([[rectangle(13, 21.5, 17, 23.5)]], FIRST, box, side=4, target="polygon")
    assert found[0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert found.dtype == torch.float32


def test_a_part_has_holes_where_it_covers_itself_but_parts_are_united() -> None:
    box = torch.tensor([[0.0, 0, 4, 4]])
    outer, inner = rectangle(0, 0, 4, 4), rectangle(1, 1, 3, 3)
    ring = np.concatenate([outer, outer[:1], inner, inner[:1]])  # one outline that goes round twice
    expected = [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert crop([[ring]], FIRST, box, side=4, target="polygon")[0].tolist() == expected
    assert crop([[outer, inner]], FIRST, box, side=4, target="polygon")[0].tolist() == [[1] * 4] * 4
    apart = [[rectangle(0, 0, 1, 4), rectangle(3, 0, 4, 4)]]
    assert crop(apart, FIRST, box, side=4, target="polygon")[0].tolist() == [[1, 0, 0, 1]] * 4


def test_a_box_without_sides_counts_as_a_tenth_of_a_pixel() -> None:
    # As detectron2 does it: centres of two cells lie 0.025 and 0.075 px inside.
    box = torch.tensor([[10.0, 10, 10, 10]])
    beside = crop([[rectangle(10.05, 0, 20, 30)]], FIRST, box, side=2, target="polygon")
    assert beside.tolist() == [[[0, 1], [0, 1]]]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([1, 5, 14]))
def test_polygons_agree_with_the_loop(seed: int, side: int) -> None:
    polygons, (boxes, gt_index) = random_polygons(seed), random_boxes(seed, 5, 4)
    found = crop(polygons, gt_index, boxes, side=side, target="polygon")
    for cells, index, box in zip(found, gt_index.tolist(), boxes.tolist(), strict=True):
        np.testing.assert_array_equal(cells.numpy(), reference.crop(polygons[index], box, side))


def test_polygons_are_pycocotools_but_at_the_outline() -> None:
    # detectron2's rasterize_polygons_within_box, whose outline is thicker: cells may differ only near it, that is
    # where a centre next to it, a cell away, is on the other side.
    side = 28
    for seed in range(20):
        polygons, (boxes, gt_index) = random_polygons(seed), random_boxes(seed, 3, 4)
        for found, index, box in zip(
            crop(polygons, gt_index, boxes, side=side, target="polygon"), gt_index.tolist(), boxes.numpy(), strict=True
        ):
            scale = side / np.maximum(box[2:] - box[:2], 0.1)
            parts = [((part - box[:2]) * scale).ravel().tolist() for part in polygons[index]]
            theirs = coco.decode(coco.merge(coco.frPyObjects(parts, side, side)))
            differs = found.numpy() != theirs
            near = np.zeros((side, side), bool)
            fine = crop(polygons, torch.tensor([index]), torch.from_numpy(box)[None], side=side * 8, target="polygon")
            padded = torch.nn.functional.pad(fine, (8, 8, 8, 8), mode="replicate")
            windows = padded[0].unfold(0, 24, 8).unfold(1, 24, 8).flatten(2)  # (M, M, 24 * 24) a cell and its eight
            near = (windows.amax(2) != windows.amin(2)).numpy()
            assert not (differs & ~near).any()
            assert differs.mean() < 0.15


def test_regions_may_be_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    polygons, (boxes, gt_index) = random_polygons(8), random_boxes(8, 20, 4)
    whole = crop(polygons, gt_index, boxes, side=14, target="polygon")
    most_edges = max(sum(len(part) for part in parts) for parts in polygons)
    for chunk in (1, 3 * 14 * most_edges):
        monkeypatch.setattr(mask_targets, "_CHUNK_CROSSINGS", chunk)
        assert torch.equal(crop(polygons, gt_index, boxes, side=14, target="polygon"), whole)


def test_a_polygon_and_its_drawing_give_the_same_cells() -> None:
    # Cells of 2 × 2 px, none of which the outline halves.
    polygons: Polygons = [[rectangle(10, 12, 50, 40)]]
    bitmap = torch.zeros(1, *SIZE, dtype=torch.uint8)
    bitmap[:, 12:40, 10:50] = 1
    box = torch.tensor([[5.5, 6.5, 61.5, 62.5]])
    by_polygon = crop(polygons, FIRST, box, side=28, target="polygon")
    assert torch.equal(crop(bitmap, FIRST, box, side=28, target="binary"), by_polygon)
    # Row 2 has its centre at 11.5 and samples at 11 and 12. torchvision reads pixel rows 11 and 12, the first of them
    # empty; column 12 has its centre at 30.5, far inside.
    assert by_polygon[0, 2, 12] == 0
    assert crop(bitmap, FIRST, box, side=28, target="soft")[0, 2, 12] == 0.5


@pytest.mark.parametrize("target", ["soft", "binary", "polygon"])
def test_a_box_that_is_not_finite_holds_nothing(target: mask_targets.MaskTarget) -> None:
    whole: Tensor | Polygons = torch.ones(1, *SIZE, dtype=torch.uint8)
    if target == "polygon":
        whole = [[rectangle(0, 0, 80, 60)]]
    good = torch.tensor([0.0, 0, 20, 20])
    boxes = good.repeat(5, 1)
    boxes[torch.arange(4), torch.arange(4)] = torch.tensor([math.nan, math.nan, math.nan, math.inf])
    found = crop(whole, torch.zeros(5, dtype=torch.int64), boxes, side=4, target=target)
    assert not found[:4].any()
    assert found[4].all()


def test_forms_that_cannot_serve_are_refused() -> None:
    box, bitmaps = torch.tensor([[0.0, 0, 20, 20]]), random_bitmaps(0, 1)
    for masks, form in ((bitmaps, "bitmaps"), (to_rles(bitmaps), "run lengths")):
        with pytest.raises(ValueError, match=f'"polygon" needs polygons, got {form}; choose "soft" or "binary"'):
            crop(masks, FIRST, box, side=4, target="polygon")
    for target in ("soft", "binary"):
        with pytest.raises(ValueError, match=rf'"{target}" needs bitmaps or run lengths.* or choose "polygon"'):
            crop(random_polygons(0), FIRST, box, side=4, target=target)


def test_no_regions_and_no_instances() -> None:
    none, no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    for masks, target in ((random_bitmaps(0), "soft"), (to_rles(random_bitmaps(0)), "binary")):
        assert crop(masks, none, no_boxes, side=4, target=target).shape == (0, 4, 4)  # type: ignore[arg-type]
    assert crop(random_polygons(0), none, no_boxes, side=4, target="polygon").shape == (0, 4, 4)
    # A place that holds no region asks for instance 0 of an image without any.
    box = torch.tensor([[0.0, 0, 20, 20]])
    assert not crop(random_bitmaps(0)[:0], FIRST, box, side=4, target="soft").any()
    assert not crop([], FIRST, box, side=4, target="binary").any()
    assert not crop([], FIRST, box, side=4, target="polygon").any()
    assert not crop([[]], FIRST, box, side=4, target="polygon").any()
    assert resized(random_bitmaps(0)[:0], SIZE, ImageSize(9, 9)).shape == (0, 9, 9)  # type: ignore[union-attr]
    assert resized([], SIZE, ImageSize(9, 9)) == flipped([], 80) == []


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(5, 130))
def test_bitmaps_are_resized_as_torchvisions(seed: int, short_side: int) -> None:
    bitmaps = random_bitmaps(seed)
    _, target = _resize_image_and_masks(torch.zeros(3, *SIZE), short_side, 150, {"masks": bitmaps})
    assert target is not None
    to_size = ImageSize(*target["masks"].shape[1:])
    assert torch.equal(resized(bitmaps, SIZE, to_size), target["masks"])  # type: ignore[arg-type]
    assert torch.equal(resized(to_rles(bitmaps), SIZE, to_size), target["masks"])  # type: ignore[arg-type]


def test_polygons_are_resized_and_flipped_by_hand() -> None:
    polygons: Polygons = [[np.array([[8.0, 6], [40, 6], [8, 30]])]]
    assert resized(polygons, SIZE, ImageSize(120, 40))[0][0].tolist() == [[4, 12], [20, 12], [4, 60]]
    assert flipped(polygons, 80)[0][0].tolist() == [[72, 6], [40, 6], [72, 30]]
    assert polygons[0][0].tolist() == [[8, 6], [40, 6], [8, 30]]


@pytest.mark.parametrize("target", ["binary", "polygon"])
def test_flipping_masks_and_boxes_flips_the_cells(target: mask_targets.MaskTarget) -> None:
    masks = random_polygons(11) if target == "polygon" else random_bitmaps(11)
    boxes, gt_index = random_boxes(11, 9, 4)
    mirrored = torch.stack([80 - boxes[:, 2], boxes[:, 1], 80 - boxes[:, 0], boxes[:, 3]], dim=1)
    here = crop(masks, gt_index, boxes, side=7, target=target)[:-1]
    there = crop(flipped(masks, 80), gt_index, mirrored, side=7, target=target)[:-1]
    differs = (here != there.flip(2)).float().mean()
    # Polygons: only a centre on an outline could change sides. Bitmaps: a sample more than a pixel outside the image
    # counts as nothing, one less far as the last pixel, on either side.
    assert differs == 0 if target == "polygon" else differs < 0.01


def test_bitmaps_and_run_lengths_flip_alike() -> None:
    bitmaps = random_bitmaps(12)
    assert torch.equal(flipped(bitmaps, 80), bitmaps[:, :, torch.arange(79, -1, -1)])  # type: ignore[arg-type]
    assert torch.equal(flipped(to_rles(bitmaps), 80), flipped(bitmaps, 80))  # type: ignore[arg-type]
    assert torch.equal(flipped(flipped(bitmaps, 80), 80), bitmaps)  # type: ignore[arg-type]


def test_run_lengths_become_bitmaps() -> None:
    bitmaps = random_bitmaps(13)
    assert torch.equal(to_bitmaps(to_rles(bitmaps)), bitmaps)
    assert to_bitmaps(bitmaps.bool()).dtype == torch.uint8


def test_masks_of_another_size_than_their_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"height=61.*got \(60, 80\)"):
        resized(random_bitmaps(0), ImageSize(61, 80), ImageSize(9, 9))
    with pytest.raises(ValueError, match="as wide as their image, 81, got 80"):
        flipped(random_bitmaps(0), 81)

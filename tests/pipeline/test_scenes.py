"""Drawn scenes: the same for the same seed, masks that fit the drawing, and archives whose annotations are exact."""

from __future__ import annotations

import json
import math
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from model.structures import ImageSize
from pipeline.scenes import ARCHIVE_SIZES, CATEGORIES, _silhouette, draw_scene, write_archive

SIZE = ImageSize(180, 240)


def test_a_seed_gives_one_scene() -> None:
    one, same, other = draw_scene(3, SIZE), draw_scene(3, SIZE), draw_scene(4, SIZE)
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.masks, same.masks)
    assert np.array_equal(one.category_ids, same.category_ids)
    assert not np.array_equal(one.image, other.image)


@pytest.mark.parametrize("size", [SIZE, ImageSize(64, 64), ImageSize(301, 97)])
def test_shapes_types_and_ids_fit(size: ImageSize) -> None:
    scene = draw_scene(7, size)
    count = len(scene.category_ids)
    assert count >= 3
    assert (scene.image.shape, scene.image.dtype) == ((*size, 3), np.dtype(np.uint8))
    assert scene.image.flags.c_contiguous
    assert (scene.masks.shape, scene.masks.dtype) == ((count, *size), np.dtype(np.bool_))
    assert set(scene.category_ids.tolist()) <= set(range(1, len(CATEGORIES) + 1))


def test_masks_are_disjoint_and_none_is_hidden() -> None:
    for seed in range(20):
        masks = draw_scene(seed, SIZE).masks
        assert masks.sum(axis=0).max() == 1
        # The least: radius 0.05 · 180 px; a ring or star covers > 1.2 r², of which 0.55 in the image and 0.4 seen.
        assert masks.sum(axis=(1, 2)).min() >= 0.4 * 0.55 * 1.2 * (0.05 * 180) ** 2


def test_scenes_overlap_and_vary() -> None:
    scenes = [draw_scene(seed, SIZE) for seed in range(20)]
    assert {int(c) for scene in scenes for c in scene.category_ids} == set(range(1, len(CATEGORIES) + 1))
    areas = np.concatenate([scene.masks.sum(axis=(1, 2)) for scene in scenes])
    assert np.percentile(areas, 90) > 8 * np.percentile(areas, 10)
    boxes = [[_box(mask) for mask in scene.masks] for scene in scenes]
    assert sum(_meet(a, b) for of_one in boxes for i, a in enumerate(of_one) for b in of_one[:i]) > 40


@pytest.mark.parametrize(
    ("category", "area"),  # of radius 1, from the corners' distances: 0.95 and 0.5; 1; 1.08; 1.12 and 0.5
    [
        ("disc", math.pi * 0.95**2),
        ("ring", math.pi * (0.95**2 - 0.5**2)),
        ("square", 2.0),
        ("triangle", 3 * math.sqrt(3) / 4 * 1.08**2),
        ("star", 10 * 0.5 * 1.12 * 0.5 * math.sin(math.pi / 5)),
    ],
)
def test_a_silhouette_has_the_area_of_its_shape(category: str, area: float) -> None:
    for radius in (9.0, 30.0):
        for angle in (0.0, 0.4, 2.0):
            alpha = _silhouette(category, radius, angle)
            rim = pytest.approx(area * radius**2, rel=0.9 / radius)  # Pillow's outlines are a quarter pixel wide here
            assert alpha.sum() == rim
            assert (alpha >= 0.5).sum() == rim
            assert not alpha[0].any()  # not cut by the patch
            assert not alpha[:, 0].any()


def test_a_mask_lies_where_the_shape_was_painted() -> None:
    """Without the shapes the ground is smooth, so the strongest edges of a scene lie at the rims of its masks."""
    scene = draw_scene(5, SIZE)
    grey = scene.image.astype(np.float32).mean(axis=2)
    steps = np.abs(np.diff(grey, axis=1))  # (H, W - 1)
    owner = (scene.masks * np.arange(1, len(scene.masks) + 1)[:, None, None]).sum(axis=0)
    rim = np.diff(owner, axis=1) != 0
    ground = (owner[:, 1:] == 0) & (owner[:, :-1] == 0)
    assert np.median(steps[rim]) > 6 * np.median(steps[ground])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scenes")
    path = write_archive(folder, num_images=12, seed=1)
    annotations: dict[str, Any] = json.loads(path.read_text())
    return folder, annotations


def test_an_archive_is_loose_files_and_a_tar(archive: tuple[Path, dict[str, Any]]) -> None:
    folder, annotations = archive
    names = [image["file_name"] for image in annotations["images"]]
    assert len(set(names)) == 12
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg")) == names[:8]
    with tarfile.open(folder / "scenes.tar") as tar:
        members = tar.getnames()
        for image, name in zip(annotations["images"][8:], names[8:], strict=True):
            member = name.removeprefix("scenes.tar#")
            assert Image.open(BytesIO(_read(tar, member))).size == (image["width"], image["height"])
            assert json.loads(_read(tar, member.replace(".jpg", ".json"))) == image
    assert len(members) == 8
    assert {(image["height"], image["width"]) for image in annotations["images"]} == set(ARCHIVE_SIZES)


def test_annotations_are_exact(archive: tuple[Path, dict[str, Any]]) -> None:
    folder, annotations = archive
    coco = COCO(str(folder / "instances.json"))
    assert [category["name"] for category in annotations["categories"]] == list(CATEGORIES)
    for image in annotations["images"]:
        scene = draw_scene(image["seed"], ImageSize(image["height"], image["width"]))
        found = coco.imgToAnns[image["id"]]
        assert [annotation["category_id"] for annotation in found] == scene.category_ids.tolist()
        for annotation, mask in zip(found, scene.masks, strict=True):
            assert np.array_equal(coco_mask.decode(annotation["segmentation"]).astype(bool), mask)
            assert annotation["area"] == mask.sum()
            left, top, right, bottom = _box(mask)
            assert annotation["bbox"] == [left, top, right - left, bottom - top]
    first = annotations["images"][0]
    drawn = draw_scene(first["seed"], ImageSize(first["height"], first["width"])).image
    stored = np.asarray(Image.open(folder / first["file_name"]))
    assert np.abs(stored.astype(int) - drawn).mean() < 6


def test_equal_seeds_write_equal_archives_and_neighbours_share_nothing(
    archive: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, annotations = archive
    write_archive(tmp_path / "same", num_images=12, seed=1)
    for name in ("scenes.tar", "instances.json", "loose/00/scene_00000.jpg"):
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    other = json.loads(write_archive(tmp_path / "other", num_images=12, seed=2).read_text())
    assert not {image["seed"] for image in other["images"]} & {image["seed"] for image in annotations["images"]}


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _meet(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _read(tar: tarfile.TarFile, member: str) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()

"""Every form of export, opened by what reads it; COCO there and back to the last bit."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from jobs.export import ExportConfig, export
from model.structures import Detections
from pipeline.errors import ConfigError, DecodeError
from pipeline.export import images_with_instances
from pipeline.export_files import polygons_of
from pipeline.results import open_results
from tests.pipeline.made_up_tables import CATEGORIES, SIZE, add_detections, add_run, write_images

NAMES = ("a/1.png", "a/1.webp", "a/2.png", "b/1.png", "b/bad.png", "b/empty.png")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    for folder in ("a", "b"):
        write_images(root / "archive" / folder, [name[2:] for name in NAMES if name.startswith(folder)])
    scores: dict[str, Any] = {"1.png": [0.9, 0.6], "1.webp": [0.7], "2.png": [0.95, 0.9, 0.4], "empty.png": []}
    add_run(str(root / "out"), "r1", str(root / "archive"), scores | {"bad.png": DecodeError("truncated", "cut")})
    return root / "out"


def rows_of(table: Path) -> list[dict[str, Any]]:
    rows = open_results(str(table)).instances().to_table().to_pylist()
    return sorted(rows, key=lambda row: (row["image_key"], row["instance_index"]))


def exported(table: Path, form: str, to: Path, **options: Any) -> Path:
    export(ExportConfig(output=str(table), format=form, to=str(to), **options))  # type: ignore[arg-type]
    return to


def quiet_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def mask_of(row: dict[str, Any]) -> NDArray[np.bool_]:
    size = [row["mask_height"], row["mask_width"]]
    mask: NDArray[np.bool_] = coco_mask.decode({"size": size, "counts": row["mask_rle"].encode()}).astype(bool)
    return mask


def test_a_coco_dataset_is_what_pycocotools_reads(table: Path, tmp_path: Path) -> None:
    coco = quiet_coco(exported(table, "coco", tmp_path / "coco.json"))
    assert [image["file_name"] for image in coco.dataset["images"]] == [
        "a/1.png", "a/1-2.webp", "a/2.png", "b/1.png", "b/empty.png",
    ]  # fmt: skip
    assert {one["id"]: one["name"] for one in coco.dataset["categories"]} == CATEGORIES
    rows = rows_of(table)
    assert len(coco.dataset["annotations"]) == len(rows) == 8
    for row, annotation in zip(rows, coco.dataset["annotations"], strict=True):
        assert np.array_equal(coco.annToMask(annotation), mask_of(row))
        assert (annotation["area"], annotation["score"]) == (row["area"], row["score"])
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == (row["x1"], row["y1"], row["x2"], row["y2"])
        assert row["image_key"].endswith(coco.imgs[annotation["image_id"]]["file_name"].replace("-2", ""))


def test_coco_results_are_scored(table: Path, tmp_path: Path) -> None:
    dataset = exported(table, "coco", tmp_path / "coco.json")
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(dataset).loadRes(str(exported(table, "coco-results", tmp_path / "results.json")))
    assert len(loaded.anns) == 8


def test_coco_to_table_to_coco_is_exact(tmp_path: Path) -> None:
    """Detections with any float32 boxes, any masks, holes and one-pixel parts among them."""
    chance = np.random.default_rng(0)
    write_images(tmp_path / "archive", [f"{index}.png" for index in range(6)])
    truth: list[dict[str, Any]] = []
    given: dict[str, Detections] = {}
    for index in range(6):
        count = int(chance.integers(0, 5))
        corners = np.sort(chance.uniform(0, 48, (count, 2, 2)).astype(np.float32), axis=1).reshape(count, 4)
        masks = [coco_mask.encode(np.asfortranarray(chance.random(SIZE) < 0.3, np.uint8)) for _ in range(count)]
        scores = np.sort(chance.random(count).astype(np.float32))[::-1].copy()
        ids = chance.integers(1, 3, count)
        given[f"{index}.png"] = Detections(
            size=SIZE, boxes=corners, scores=scores, category_ids=ids, masks=masks,
            categories=[CATEGORIES[one] for one in ids.tolist()],
            areas=np.array([coco_mask.area(mask) for mask in masks], np.int64),
        )  # fmt: skip
        for box, score, category, mask in zip(corners.astype(float), scores.tolist(), ids.tolist(), masks, strict=True):
            truth.append({
                "image_id": index + 1, "category_id": category, "score": score,
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                "segmentation": {"size": list(SIZE), "counts": mask["counts"].decode()},
            })  # fmt: skip
    add_detections(str(tmp_path / "out"), "r1", str(tmp_path / "archive"), given)
    results = json.loads(exported(tmp_path / "out", "coco-results", tmp_path / "r.json").read_text())
    assert results == truth


def test_ids_names_and_categories_are_those_of_annotations(table: Path, tmp_path: Path) -> None:
    annotations = {
        "images": [
            {"id": 70, "file_name": "a/2.png", "height": SIZE.height, "width": SIZE.width},
            {"id": 90, "file_name": "b/1.png", "height": SIZE.height, "width": SIZE.width},
            {"id": 91, "file_name": "c/1.png", "height": SIZE.height, "width": SIZE.width},
        ],
        "categories": [{"id": 5, "name": "ring"}, {"id": 6, "name": "star"}],
        "annotations": [],
    }
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    options = {"annotations": str(tmp_path / "truth.json")}
    results = json.loads(exported(table, "coco-results", tmp_path / "r.json", **options).read_text())
    rings = [
        row for row in rows_of(table) if row["category"] == "ring" and row["image_key"].endswith(("a/2.png", "b/1.png"))
    ]
    assert [one["image_id"] for one in results] == [70 if row["image_key"].endswith("a/2.png") else 90 for row in rings]
    assert {one["category_id"] for one in results} <= {5}
    assert results
    coco = quiet_coco(exported(table, "coco", tmp_path / "c.json", **options))
    assert sorted(coco.imgs) == [70, 90]
    assert coco.imgs[70]["file_name"] == "a/2.png"


def test_conditions_leave_instances_out_and_images_in(table: Path, tmp_path: Path) -> None:
    coco = quiet_coco(exported(table, "coco", tmp_path / "coco.json", where="score > 0.65 AND category = 'disc'"))
    wanted = [row for row in rows_of(table) if row["score"] > 0.65 and row["category"] == "disc"]
    assert len(coco.anns) == len(wanted) > 0
    assert len(coco.imgs) == 5
    with pytest.raises(ConfigError, match="the condition was not accepted"):
        exported(table, "coco", tmp_path / "no.json", where="colour = 3")
    assert not (tmp_path / "no.json").exists()


def test_polygons_cover_their_masks(table: Path, tmp_path: Path) -> None:
    folder = exported(table, "yolo", tmp_path / "yolo")
    labels = sorted(str(path.relative_to(folder / "labels")) for path in (folder / "labels").rglob("*.txt"))
    assert labels == ["a/1-2.txt", "a/1.txt", "a/2.txt", "b/1.txt", "b/empty.txt"]
    assert (folder / "labels" / "b" / "empty.txt").read_text() == ""
    lines = (folder / "labels" / "a" / "2.txt").read_text().splitlines()
    rows = [row for row in rows_of(table) if row["image_key"].endswith("a/2.png")]
    for line, row in zip(lines, rows, strict=True):
        number, *values = line.split()
        assert int(number) == row["category_id"] - 1
        points = np.array(values, float).reshape(-1, 2) * [SIZE.width, SIZE.height]
        drawn = np.zeros(SIZE, np.uint8)
        cv2.fillPoly(drawn, [points.round().astype(np.int32)], 1)
        assert np.array_equal(drawn.astype(bool), mask_of(row))
    assert 'names:\n  0: "disc"\n  1: "ring"\n' in (folder / "data.yaml").read_text()


def test_small_parts_are_polygons_too() -> None:
    mask = np.zeros((8, 9), np.uint8, order="F")
    mask[2, 3] = mask[5, 4:8] = 1  # a pixel and a line
    row = {"mask_height": 8, "mask_width": 9, "mask_rle": coco_mask.encode(mask)["counts"].decode()}
    parts = polygons_of(row)
    assert sorted(part.tolist() for part in parts) == [
        [[2.5, 1.5], [3.5, 1.5], [3.5, 2.5], [2.5, 2.5]],
        [[3.5, 4.5], [7.5, 4.5], [7.5, 5.5], [3.5, 5.5]],
    ]
    box = polygons_of({"mask_rle": None, "x1": 1.0, "y1": 2.0, "x2": 3.0, "y2": 5.0})
    assert box[0].tolist() == [[1, 2], [3, 2], [3, 5], [1, 5]]


def test_label_maps_hold_the_best_instance_of_each_pixel(table: Path, tmp_path: Path) -> None:
    folder = exported(table, "masks", tmp_path / "masks")
    labels = np.array(Image.open(folder / "a" / "2.png.png"))
    assert labels.dtype == np.uint16
    expected = np.zeros(SIZE, np.uint16)
    rows = [row for row in rows_of(table) if row["image_key"].endswith("a/2.png")]
    for row in reversed(rows):
        expected[mask_of(row)] = row["instance_index"] + 1
    assert np.array_equal(labels, expected)
    assert not np.array(Image.open(folder / "b" / "empty.png.png")).any()


def test_overlays_are_drawn_and_what_is_gone_is_counted(table: Path, tmp_path: Path) -> None:
    copy = tmp_path / "archive"
    write_images(copy, ["x.png", "y.png"])
    add_run(str(tmp_path / "out"), "r1", str(copy), {"x.png": [0.9], "y.png": [0.8]})
    (copy / "y.png").unlink()
    config = ExportConfig(output=str(tmp_path / "out"), format="overlays", to=str(tmp_path / "drawn"))
    assert export(config) == {"images": 1, "instances": 1, "images that are gone": 1}
    drawn = np.array(Image.open(tmp_path / "drawn" / "x.png.jpg"))
    assert drawn.shape == (*SIZE, 3)
    assert np.abs(drawn.astype(int) - np.array(Image.open(copy / "x.png")).astype(int)).max() > 40


def test_parquet_is_the_committed_rows(table: Path, tmp_path: Path) -> None:
    folder = exported(table, "parquet", tmp_path / "plain")
    results = open_results(str(table))
    for name, dataset in (("images", results.images()), ("instances", results.instances())):
        plain = pq.read_table(folder / f"{name}.parquet")
        assert plain.to_pylist() == dataset.to_table(columns=plain.column_names).to_pylist()
    assert pq.read_table(folder / "images.parquet").num_rows == len(NAMES)
    (original,) = {
        tuple(sorted(pq.read_schema(file).metadata.items())) for file in (table / "instances").rglob("*.parquet")
    }
    kept = pq.read_schema(folder / "instances.parquet").metadata
    assert {name: kept[name] for name, _ in original if name.startswith(b"maskline.")} == {
        name: value for name, value in original if name.startswith(b"maskline.")
    }


def test_what_cannot_be_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="annotations give image ids, which yolo has none of"):
        ExportConfig(output="o", format="yolo", to="t", annotations="a.json")
    with pytest.raises(ConfigError, match="image_prefix goes with --annotations"):
        ExportConfig(output="o", format="coco", to="t", image_prefix="p")
    with pytest.raises(ConfigError, match="not a results table"):
        exported(tmp_path, "coco", tmp_path / "c.json")


def test_images_come_in_the_order_of_their_keys(table: Path) -> None:
    groups = list(images_with_instances(open_results(str(table))))
    keys = [group.image["image_key"] for group in groups]
    assert keys == sorted(keys)
    assert [len(group.instances) for group in groups] == [2, 1, 3, 2, 0]


def test_supervision_reads_the_dataset(table: Path, tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    shutil.copytree(table.parent / "archive", tmp_path / "images")
    (tmp_path / "images" / "a" / "1.webp").rename(tmp_path / "images" / "a" / "1-2.webp")
    exported(table, "coco", tmp_path / "coco.json")
    dataset = supervision.DetectionDataset.from_coco(
        str(tmp_path / "images"), str(tmp_path / "coco.json"), force_masks=True
    )
    found = {path: detections for path, _, detections in dataset}
    rows = [row for row in rows_of(table) if row["image_key"].endswith("a/2.png")]
    (path,) = (path for path in found if path.endswith("a/2.png"))
    assert np.array_equal(np.asarray(found[path].mask), np.stack([mask_of(row) for row in rows]))


def test_hugging_face_reads_the_parquet(table: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = exported(table, "parquet", tmp_path / "plain")
    loaded = datasets.Dataset.from_parquet(str(folder / "instances.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 8
    assert set(loaded["category"]) <= set(CATEGORIES.values())


def test_labelme_files_hold_each_instance(table: Path, tmp_path: Path) -> None:
    folder = exported(table, "labelme", tmp_path / "labelme")
    document = json.loads((folder / "a" / "2.json").read_text())
    assert [shape["label"] for shape in document["shapes"]] == [
        row["category"] for row in rows_of(table) if row["image_key"].endswith("a/2.png")
    ]
    assert (document["imageHeight"], document["imageWidth"]) == SIZE
    (key,) = {row["image_key"] for row in rows_of(table) if row["image_key"].endswith("a/2.png")}
    assert (folder / "a" / document["imagePath"]).resolve() == Path(key).resolve()

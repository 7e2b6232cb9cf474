"""Scores against COCOeval run by hand, worked cases, and the way from a table's keys to annotated images."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.structures import Detections, ImageSize, Rle
from pipeline import commits
from pipeline.archive import ITEM_SCHEMA
from pipeline.coco import read_coco
from pipeline.coco_evaluation import (
    IOU_THRESHOLDS,
    RECALLS,
    STAT_NAMES,
    Kind,
    Result,
    category_mapping,
    score,
    to_coco_results,
)
from pipeline.commits import Commit
from pipeline.errors import ConfigError, DecodeError
from pipeline.items import Item
from pipeline.precision_recall import draw_precision_recall
from pipeline.results import ShardRows, TableMetadata, open_results, write_table
from pipeline.scenes import CATEGORIES, write_archive
from pipeline.table_results import match_image_keys, read_table
from tests.model.conftest import DATA

FIELDS: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
SETS = ("scenes", "coco100/instances_train2017.json", "nuclei/instances_val.json")


def indexed(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def by_hand(coco: COCO, results: list[Result], kind: Kind, category_ids: list[int] | None = None) -> Any:
    """COCOeval as its demo runs it, over results of one kind."""
    truth = indexed(copy.deepcopy(coco.dataset))
    with redirect_stdout(io.StringIO()):
        keys = ("image_id", "category_id", "score", FIELDS[kind])
        found = truth.loadRes([{key: copy.deepcopy(result[key]) for key in keys} for result in results])
        evaluation = COCOeval(truth, found, kind)
        if category_ids is not None:
            evaluation.params.catIds = category_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def perturbed(coco: COCO, rng: Generator) -> list[Result]:
    """Most objects, each moved; some in another category; and as many again that are somewhere else."""
    categories = coco.getCatIds()
    results: list[Result] = []
    for annotation in coco.dataset["annotations"]:
        if rng.random() < 0.1:
            continue
        for reach in (0.06, 1.0):
            dx, dy = rng.normal(0, reach, 2) * annotation["bbox"][2:]
            mask = np.roll(coco.annToMask(annotation), (round(dy), round(dx)), axis=(0, 1))
            rle = coco_mask.encode(np.asfortranarray(mask))
            x, y, width, height = annotation["bbox"]
            result = {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"] if rng.random() < 0.9 else int(rng.choice(categories)),
                "score": float(rng.random() ** (0.5 if reach < 1 else 2)),
                "bbox": [x + dx, y + dy, width * rng.uniform(0.9, 1.1), height * rng.uniform(0.9, 1.1)],
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
            if "keypoints" in annotation:
                points = np.array(annotation["keypoints"], float).reshape(-1, 3)
                points[:, :2] += rng.normal(0, 0.05 * reach * max(width, height), (len(points), 2))
                result["keypoints"] = points.ravel().tolist()
            results.append(result)
    return results


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> COCO:
    path = write_archive(tmp_path_factory.mktemp("scenes"), num_images=12, seed=3)
    document = json.loads(path.read_text())
    for annotation in document["annotations"][::9]:  # as if nobody had told the shapes of a heap apart
        annotation["iscrowd"] = 1
    path.write_text(json.dumps(document))
    return read_coco(str(path)).coco()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], COCO]:
    """Scenes in which every shape is a person of K keypoints, some of them unlabelled."""

    def make(num_keypoints: int) -> COCO:
        rng = np.random.default_rng(5)
        path = write_archive(tmp_path_factory.mktemp("people"), num_images=8, seed=4)
        document = json.loads(path.read_text())
        names = [f"point {index}" for index in range(num_keypoints)]
        document["categories"] = [{"id": 1, "name": "person", "keypoints": names, "skeleton": []}]
        for annotation in document["annotations"]:
            x, y, width, height = annotation["bbox"]
            seen = rng.integers(0, 3, num_keypoints) * (rng.random() < 0.8)
            points = np.stack([rng.uniform(x, x + width, num_keypoints), rng.uniform(y, y + height, num_keypoints)])
            annotation["category_id"] = 1
            annotation["keypoints"] = np.stack([*(points * (seen > 0)), seen], axis=1).ravel().tolist()
            annotation["num_keypoints"] = int((seen > 0).sum())
        path.write_text(json.dumps(document))
        return read_coco(str(path), wanted=frozenset({"masks", "keypoints"})).coco()

    return make


@pytest.fixture(scope="module", params=SETS)
def coco(request: pytest.FixtureRequest, scenes: COCO) -> COCO:
    if request.param == "scenes":
        return scenes
    path = DATA / request.param
    if not path.exists():
        pytest.skip(f"no {path}")
    coco = read_coco(str(path)).coco()
    images = coco.dataset["images"][:30]
    kept = {image["id"] for image in images}
    annotations = [annotation for annotation in coco.dataset["annotations"] if annotation["image_id"] in kept]
    return indexed(coco.dataset | {"images": images, "annotations": annotations})


def assert_stats(found: dict[str, float], kind: Kind, expected: NDArray[np.float64]) -> None:
    assert tuple(found) == STAT_NAMES[kind]
    wanted = [np.nan if value == -1 else value for value in expected]
    np.testing.assert_allclose(list(found.values()), wanted, rtol=0, atol=1e-12)


def test_numbers_are_those_of_cocoeval_run_by_hand(coco: COCO) -> None:
    before = copy.deepcopy(coco.dataset)
    results = perturbed(coco, np.random.default_rng(0))
    scores = score(coco, results, ("bbox", "segm"))
    assert coco.dataset == before
    for kind, found in scores.items():
        evaluation = by_hand(coco, results, kind)
        assert 0.1 < found.stats["AP"] < 0.9
        assert_stats(found.stats, kind, evaluation.stats)
        np.testing.assert_array_equal(evaluation.params.iouThrs, IOU_THRESHOLDS)
        np.testing.assert_array_equal(evaluation.params.recThrs, RECALLS)


def test_ap_of_a_category_is_that_of_cocoeval_on_it_alone(scenes: COCO) -> None:
    results = perturbed(scenes, np.random.default_rng(1))
    for kind, found in score(scenes, results, ("bbox", "segm")).items():
        assert tuple(found.per_category) == CATEGORIES
        for category_id, name in enumerate(CATEGORIES, start=1):
            evaluation = by_hand(scenes, results, kind, [category_id])
            assert found.per_category[name] == pytest.approx(evaluation.stats[0], abs=1e-12)
            objects = scenes.loadAnns(scenes.getAnnIds(catIds=[category_id], iscrowd=False))
            assert found.num_objects[name] == len(objects)


def test_keypoints_are_scored_as_by_hand(people: Callable[[int], COCO]) -> None:
    coco = people(17)
    results = perturbed(coco, np.random.default_rng(2))
    found = score(coco, results, ("keypoints", "bbox"))
    assert 0.1 < found["keypoints"].stats["AP"] < 0.9
    assert_stats(found["keypoints"].stats, "keypoints", by_hand(coco, results, "keypoints").stats)
    assert_stats(found["bbox"].stats, "bbox", by_hand(coco, results, "bbox").stats)
    labelled = sum(annotation["num_keypoints"] > 0 for annotation in coco.dataset["annotations"])
    assert found["keypoints"].num_objects == {"person": labelled}


def test_other_keypoints_than_a_persons_are_scored(people: Callable[[int], COCO]) -> None:
    coco = people(4)
    results = perturbed(coco, np.random.default_rng(2))
    exact = [
        {key: annotation[key] for key in ("image_id", "category_id", "keypoints")} | {"score": 0.5}
        for annotation in coco.dataset["annotations"]
        if annotation["num_keypoints"]
    ]
    assert 0 < score(coco, results, ("keypoints",))["keypoints"].stats["AP"] < 0.9
    assert score(coco, exact, ("keypoints",))["keypoints"].stats["AP"] == pytest.approx(1)
    with pytest.raises(ConfigError, match="annotated objects have 4 keypoints, the detections 17"):
        score(coco, [exact[0] | {"keypoints": [0.0] * 51}], ("keypoints",))


def test_perfect_detections_give_one_and_none_give_zero(scenes: COCO) -> None:
    perfect = [
        {key: annotation[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 1.0}
        for annotation in scenes.dataset["annotations"]
    ]
    for found in score(scenes, perfect, ("bbox", "segm")).values():
        assert found.stats == pytest.approx(
            dict.fromkeys(found.stats, 1.0) | {name: found.stats[name] for name in ("AR1", "AR10")}, nan_ok=True
        )
        assert list(found.per_category.values()) == pytest.approx([1.0] * len(CATEGORIES))
    for kind, found in score(scenes, [], ("bbox", "segm", "keypoints")).items():
        assert found.stats["AP"] == 0 or kind == "keypoints"  # nobody annotated a keypoint: there is no number
    assert np.isnan(score(scenes, [], ("keypoints",))["keypoints"].stats["AP"])


def test_some_images_only_are_scored(scenes: COCO) -> None:
    chosen = scenes.getImgIds()[:4]
    results = [
        {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for annotation in scenes.dataset["annotations"]
        if annotation["image_id"] in chosen
    ]
    assert score(scenes, results, ("bbox",), image_ids=chosen)["bbox"].stats["AP"] == pytest.approx(1)
    assert score(scenes, results, ("bbox",))["bbox"].stats["AP"] < 0.6


def tiny_coco(categories: dict[int, str], annotated: int) -> COCO:
    """One image of one object, whose id is 0."""
    annotation = {
        "id": 0,
        "image_id": 7,
        "category_id": annotated,
        "bbox": [10, 10, 50, 50],
        "area": 2500,
        "iscrowd": 0,
    }
    return indexed(
        {
            "images": [{"id": 7, "height": 100, "width": 100}],
            "categories": [{"id": index, "name": name} for index, name in categories.items()],
            "annotations": [annotation],
        }
    )


def test_the_object_numbered_zero_can_be_found_and_an_absent_category_has_no_number() -> None:
    coco = tiny_coco({1: "cat", 2: "dog"}, annotated=1)
    found = score(coco, [{"image_id": 7, "category_id": 1, "score": 0.9, "bbox": [10, 10, 50, 50]}], ("bbox",))["bbox"]
    assert (found.stats["AP"], found.per_category["cat"]) == pytest.approx((1, 1))
    assert np.isnan(found.per_category["dog"])
    assert np.isnan(found.stats["APs"])  # 2,500 pixels are neither small nor large
    assert found.stats["APm"] == pytest.approx(1)
    assert found.precision.shape == (10, 101, 2)
    assert np.isnan(found.precision[:, :, 1]).all()


def test_equal_names_stay_two_categories() -> None:
    found = score(tiny_coco({1: "cat", 5: "cat"}, annotated=5), [], ("bbox",))["bbox"]
    assert found.num_objects == {"cat (1)": 0, "cat (5)": 1}


def detections(**changes: Any) -> Detections:
    fields: dict[str, Any] = {
        "size": ImageSize(20, 30),
        "boxes": np.array([[1.5, 2, 4, 8], [0, 0, 30, 20], [3, 3, 5, 6]], np.float32),
        "scores": np.array([0.75, 0.5, 0.25], np.float32),
        "category_ids": np.array([2, 9, 1]),
        "categories": ["dog", "nothing", "cat"],
        "masks": [Rle(size=[20, 30], counts=bytes([65 + index])) for index in range(3)],
        "areas": np.array([1, 1, 1]),
    }
    return Detections(**(fields | changes))


def test_results_have_cocos_fields_and_ids() -> None:
    keypoints = np.arange(3 * 2 * 3, dtype=np.float32).reshape(3, 2, 3)
    found = to_coco_results(42, detections(keypoints=keypoints), {1: 17, 2: 18})
    assert found == [
        {"image_id": 42, "category_id": 18, "score": 0.75, "bbox": [1.5, 2.0, 2.5, 6.0],
         "segmentation": {"size": [20, 30], "counts": "A"}, "keypoints": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]},
        {"image_id": 42, "category_id": 17, "score": 0.25, "bbox": [3.0, 3.0, 2.0, 3.0],
         "segmentation": {"size": [20, 30], "counts": "C"}, "keypoints": [12.0, 13.0, 14.0, 15.0, 16.0, 17.0]},
    ]  # fmt: skip
    json.dumps(found)
    assert set(to_coco_results(42, detections(masks=[]), {1: 17})[0]) == {"image_id", "category_id", "score", "bbox"}
    nothing = {"scores": np.zeros(0, np.float32), "category_ids": np.zeros(0, int), "categories": [], "masks": []}
    assert to_coco_results(1, detections(boxes=np.zeros((0, 4), np.float32), **nothing), {1: 1}) == []


def test_categories_are_matched_by_name() -> None:
    assert category_mapping({1: "cat", 2: "dog", 3: "N/A"}, {18: "dog", 17: "cat", 40: "bird"}) == {1: 17, 2: 18}
    with pytest.raises(ConfigError, match=r"the network has class 1, class 2; the annotations have nucleus\."):
        category_mapping({1: "class 1", 2: "class 2"}, {1: "nucleus"})
    with pytest.raises(ConfigError, match="and 68 more"):
        category_mapping({index: f"class {index}" for index in range(1, 81)}, {})


def write_results(
    output: Path,
    found: Mapping[str, Detections | DecodeError],
    categories: Iterable[str],
    *,
    run_id: str = "1",
    score_threshold: float = 0.05,
) -> None:
    """Commit a results table of these image keys, as one run of weights of its own."""
    metadata = TableMetadata(
        weights_name="w",
        weights_sha256=f"weights {run_id}",
        settings_hash="2",
        settings={"score_threshold": score_threshold},
        categories=dict(enumerate(categories, start=1)),
    )
    items = [Item(key, "v", "file", key)._asdict() for key in found]
    rows = ShardRows(pa.Table.from_pylist(items, schema=ITEM_SCHEMA), f"shard-{run_id}", run_id)
    for index, one in enumerate(found.values()):
        if isinstance(one, DecodeError):
            rows.add_failed(index, one, 5)
        else:
            rows.add_ok(index, one.size, 1, 5, one)
    files = tuple(
        write_table(str(output), name, rows.tables()[name], f"{rows.shard_id}-a", metadata, run_id)
        for name in ("images", "instances")
    )
    commit = Commit(
        shard_id=rows.shard_id,
        attempt_id="a",
        run_id=run_id,
        weights_sha256=metadata.weights_sha256,
        settings_hash=metadata.settings_hash,
        inputs_hash="3",
        images=len(found),
        failed_by_reason=rows.failed_by_reason(),
        instances=rows.num_instances,
        files=files,
    )
    commits.create_table(str(output))
    commits.publish(str(output), commit, exclusive=True)


def test_a_table_holds_the_results_that_its_detections_make(tmp_path: Path) -> None:
    keypoints = np.arange(3 * 2 * 3, dtype=np.float32).reshape(3, 2, 3)
    found: dict[str, Detections | DecodeError] = {
        "/d/1.jpg": detections(),
        "/d/2.jpg": detections(masks=[], keypoints=keypoints),
        "/d/3.jpg": DecodeError("truncated", "cut"),
        "/d/4.jpg": detections(),
    }
    write_results(tmp_path, found, ["cat", "dog", "nothing"])
    image_ids = {"1.jpg": 11, "2.jpg": 12, "3.jpg": 13, "absent.jpg": 14}
    table = read_table(open_results(str(tmp_path)), image_ids, {17: "cat", 18: "dog"})
    expected = [
        result
        for key, image_id in (("/d/1.jpg", 11), ("/d/2.jpg", 12))
        if isinstance(one := found[key], Detections)
        for result in to_coco_results(image_id, one, {1: 17, 2: 18})
    ]
    assert table.results == expected
    assert table.image_ids == {"/d/1.jpg": 11, "/d/2.jpg": 12, "/d/3.jpg": 13}
    assert table.sizes == {11: (20, 30), 12: (20, 30), 13: None}
    assert table.failed_by_reason == {"truncated": 1}
    assert (table.num_unknown_images, table.num_unknown_instances) == (1, 2)


def test_superseded_rows_are_neither_scored_nor_asked_for_their_categories(tmp_path: Path) -> None:
    write_results(tmp_path, {"/d/1.jpg": detections(categories=["bird"] * 3)}, ["bird"], score_threshold=0.9)
    write_results(tmp_path, {"/d/1.jpg": detections()}, ["cat", "dog", "nothing"], run_id="2")
    table = read_table(open_results(str(tmp_path)), {"1.jpg": 1}, {17: "cat"})
    assert [result["category_id"] for result in table.results] == [17]
    assert table.categories == {"cat", "dog", "nothing"}
    assert table.settings == [{"score_threshold": 0.05}]


def test_a_table_in_which_nothing_was_found_can_be_read(tmp_path: Path) -> None:
    write_results(tmp_path, {"/d/1.jpg": DecodeError("empty", "")}, ["cat"])
    table = read_table(open_results(str(tmp_path)), {"1.jpg": 1, "2.jpg": 2}, {17: "cat"})
    assert (table.results, table.sizes) == ([], {1: None})


def test_a_key_belongs_to_the_longest_file_name_that_ends_it() -> None:
    names = {"1.jpg": 1, "b/1.jpg": 2, "2.jpg": 3, "scenes.tar#3.jpg": 4, "x/4.jpg": 5, "7": 6}
    keys = [
        "/data/a/1.jpg",
        "/data/b/1.jpg",
        "s3://bucket/t.tar#2.jpg",
        "/data/scenes.tar#3.jpg",
        "/data/xx/4.jpg",
        "/data/21.jpg",
        "/data/t.parquet#7",
    ]
    expected = {keys[0]: 1, keys[1]: 2, keys[2]: 3, keys[3]: 4, keys[6]: 6}
    assert match_image_keys(keys, names) == expected
    assert match_image_keys(["1.jpg"], names) == {"1.jpg": 1}
    assert match_image_keys(["/data/odd-\ufffdff.jpg"], {"odd-\udcff.jpg": 9}) == {"/data/odd-\ufffdff.jpg": 9}


def test_two_keys_of_one_image_are_told_apart_by_a_prefix() -> None:
    keys = ["/data/train/1.jpg", "/data/val/1.jpg", "/data/val/deep/1.jpg"]
    with pytest.raises(ConfigError, match=r"/data/train/1\.jpg and /data/val/1\.jpg .*--image-prefix"):
        match_image_keys(keys, {"1.jpg": 1})
    for prefix in ("/data/val", "/data/val/", "/data/./val/"):
        assert match_image_keys(keys, {"1.jpg": 1}, prefix) == {"/data/val/1.jpg": 1}
    assert match_image_keys(["s3://b/x.tar#1.jpg", "s3://b/1.jpg"], {"1.jpg": 1}, "s3://b/x.tar#") == {
        "s3://b/x.tar#1.jpg": 1
    }
    assert match_image_keys(["s3://b/img_1.jpg"], {"1.jpg": 1}, "s3://b/img_") == {"s3://b/img_1.jpg": 1}


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_the_picture_shows_curves(kind: Kind, scenes: COCO, people: Callable[[int], COCO], tmp_path: Path) -> None:
    coco = people(17) if kind == "keypoints" else scenes
    results = perturbed(coco, np.random.default_rng(0))
    found, nothing = (score(coco, given, (kind,))[kind] for given in (results, []))
    pictures: list[NDArray[np.int64]] = []
    for index, scored in enumerate((found, nothing)):
        (tmp_path / f"{index}.png").write_bytes(draw_precision_recall(scored))
        with Image.open(tmp_path / f"{index}.png") as image:
            assert image.format == "PNG"
            pictures.append(np.array(image.convert("RGB")).astype(int))
    for colour in ((42, 157, 143), (233, 161, 59), (38, 70, 83)):  # of the three curves
        drawn = (np.abs(pictures[0] - colour).sum(axis=2) < 12).sum()
        assert drawn > 100
    assert (pictures[0] != pictures[1]).any()


def test_many_categories_and_none_can_be_drawn(tmp_path: Path) -> None:
    categories = {index: f"${index} [a]_{{" for index in range(1, 41)}
    coco = tiny_coco(categories, annotated=1)
    first = coco.dataset["annotations"][0]
    coco.dataset["annotations"] = [first | {"id": index, "category_id": index} for index in categories]
    results = [{key: first[key] for key in ("image_id", "bbox")} | {"category_id": 3, "score": 0.5}]
    pictures = [draw_precision_recall(score(coco, results, ("bbox",))["bbox"])]
    coco.dataset["annotations"] = []
    pictures.append(draw_precision_recall(score(coco, results, ("bbox",))["bbox"]))
    for picture in pictures:
        with Image.open(io.BytesIO(picture)) as image:
            assert min(image.size) > 400
            assert len(set(image.convert("L").get_flattened_data())) > 20

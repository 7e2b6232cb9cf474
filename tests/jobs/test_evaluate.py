"""maskline evaluate: weights, their table and pycocotools by hand agree; what does not belong together is said."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

import model
from jobs.evaluate import EvaluateConfig, evaluate, main
from model.structures import Detections, ImageSize
from pipeline import decode
from pipeline.archive import list_images, read_images
from pipeline.coco_evaluation import STAT_NAMES, Kind
from pipeline.errors import ConfigError, DecodeError
from pipeline.scenes import CATEGORIES, write_archive
from tests.jobs.conftest import small_network
from tests.jobs.test_segment import last_json, maskline
from tests.pipeline.test_coco_evaluation import write_results

THRESHOLD = 0.3
IDS = {name: 10 * index for index, name in enumerate(reversed(CATEGORIES), start=1)}
"""COCO's ids of the categories: neither the network's indices nor in their order."""


def run_evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    write_archive(folder, num_images=8, seed=0)
    return folder


@pytest.fixture(scope="module")
def net() -> model.MaskRCNN:
    return small_network(dict(enumerate(CATEGORIES, start=1)))


@pytest.fixture(scope="module")
def weights(net: model.MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model.save(net, path)
    return path


@pytest.fixture(scope="module")
def predicted(archive: Path, net: model.MaskRCNN) -> dict[str, Detections]:
    """By file name: every image decoded, and run alone."""
    found = {}
    for batch in list_images([str(archive)]):
        for index, data in read_images(batch):
            assert not isinstance(data, DecodeError)
            name = batch["image_key"][index].as_py().removeprefix(f"{archive}/")
            pixels = decode.decode(data, decode.inspect(data, decode.DecodeLimits()))
            (found[name],) = net.predict([pixels], score_threshold=THRESHOLD)
    return found


@pytest.fixture(scope="module")
def truth(archive: Path, predicted: dict[str, Detections]) -> Path:
    """What the network finds, moved a little and thinned out: random weights would find none of what was drawn."""
    rng = np.random.default_rng(0)
    document = json.loads((archive / "instances.json").read_text())
    document["categories"] = [{"id": category_id, "name": name} for name, category_id in IDS.items()]
    objects: list[dict[str, Any]] = []
    for image in document["images"]:
        found = predicted[image["file_name"]]
        for index in rng.permutation(len(found))[:12].tolist():
            shift = tuple(rng.choice((0, 0, 0, 1, 8), 2).tolist())
            rle = coco_mask.encode(np.asfortranarray(np.roll(coco_mask.decode(found.masks[index]), shift, (0, 1))))
            if coco_mask.area(rle) == 0:
                continue
            fields = {"id": len(objects) + 1, "image_id": image["id"], "category_id": IDS[found.categories[index]]}
            fields |= {"bbox": coco_mask.toBbox(rle).tolist(), "area": int(coco_mask.area(rle)), "iscrowd": 0}
            objects.append(fields | {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}})
    document["annotations"] = objects
    path = archive / "found.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def table(archive: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("results") / "out"
    options = ("--weights", weights, "--score-threshold", THRESHOLD, "--images-per-shard", 3, "--json")
    last_json(maskline("segment", archive, "--output", output, *options))
    return output


@pytest.fixture(scope="module")
def by_hand(truth: Path, predicted: dict[str, Detections]) -> dict[Kind, NDArray[np.float64]]:
    """The numbers of pycocotools alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    stats: dict[Kind, NDArray[np.float64]] = {}
    for kind in STAT_NAMES:
        if kind == "keypoints":
            continue
        with redirect_stdout(io.StringIO()):
            coco = COCO(truth)
            results: list[dict[str, Any]] = []
            for image in coco.dataset["images"]:
                found = predicted[image["file_name"]]
                for index, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
                    one = {"image_id": image["id"], "category_id": IDS[found.categories[index]]}
                    one["score"] = float(found.scores[index])
                    one |= {"bbox": [x1, y1, x2 - x1, y2 - y1]} if kind == "bbox" else {}
                    one |= {"segmentation": found.masks[index]} if kind == "segm" else {}
                    results.append(one)
            evaluation = COCOeval(coco, coco.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats[kind] = np.where(evaluation.stats == -1, np.nan, evaluation.stats)
    return stats


def test_the_table_scores_as_predict_and_pycocotools_by_hand(
    table: Path, truth: Path, by_hand: dict[Kind, NDArray[np.float64]]
) -> None:
    evaluation = evaluate(EvaluateConfig(annotations=str(truth), results=str(table)))
    assert set(evaluation.scores) == {"bbox", "segm"}
    for kind, found in evaluation.scores.items():
        assert 0.01 < found.stats["AP"] < 1  # twelve of a hundred detections of an image are right
        np.testing.assert_allclose(list(found.stats.values()), by_hand[kind], rtol=0, atol=1e-6)
        assert list(found.per_category) == list(IDS)
    assert (evaluation.num_images, evaluation.images_missing, evaluation.images_failed) == (8, [], [])


def test_weights_score_as_their_table_does(
    archive: Path, weights: Path, table: Path, truth: Path, tmp_path: Path
) -> None:
    options = ("--annotations", truth, "--images", archive, "--weights", weights, "--output", tmp_path / "out")
    found = last_json(run_evaluate(*options, "--score-threshold", THRESHOLD, "--json"))
    expected = evaluate(EvaluateConfig(annotations=str(truth), results=str(table))).to_json()
    for name in ("bbox", "segm"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
        assert found["per_category"][name] == pytest.approx(expected["per_category"][name], abs=1e-6)
    assert {name: found[name] for name in ("images", "images_missing", "images_failed", "images_unknown")} == {
        "images": 8, "images_missing": 0, "images_failed": 0, "images_unknown": 0
    }  # fmt: skip
    assert found["detections"] == expected["detections"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    again = evaluate(EvaluateConfig(annotations=str(truth), results=str(tmp_path / "out" / "results")))
    assert again.to_json() == found
    for kind in ("bbox", "segm"):
        with Image.open(tmp_path / "out" / f"precision_recall_{kind}.png") as image:
            assert len(set(image.convert("L").get_flattened_data())) > 20


def altered(truth: Path, folder: Path, **fields: Any) -> EvaluateConfig:
    """The annotations with some fields replaced, against a table that the caller names."""
    path = folder / "altered.json"
    path.write_text(json.dumps(json.loads(truth.read_text()) | fields))
    return EvaluateConfig(annotations=str(path), results="")


def test_images_without_rows_count_as_found_empty(table: Path, truth: Path, tmp_path: Path) -> None:
    document = json.loads(truth.read_text())
    first, *rest = document["images"]
    first["file_name"] = "elsewhere.jpg"
    rest[0] |= {"height": rest[0]["height"] + 1}
    config = altered(truth, tmp_path, images=[first, *rest])
    objects = [one for one in document["annotations"] if one["image_id"] != rest[0]["id"]]  # of the old size
    Path(config.annotations).write_text(json.dumps(document | {"images": [first, *rest], "annotations": objects}))
    found = evaluate(EvaluateConfig(annotations=config.annotations, results=str(table)))
    assert (found.images_missing, found.num_unknown_images) == (["elsewhere.jpg"], 1)
    assert found.images_resized == [rest[0]["file_name"]]
    words = "\n".join(found.notes())
    assert "1 images (elsewhere.jpg) have no row in the table" in words
    assert "1 rows are of images that the annotations lack" in words
    assert found.to_json()["first_missing"] == ["elsewhere.jpg"]
    assert f"made with score_threshold {THRESHOLD}" in words


def test_categories_that_only_one_side_has_are_said(
    table: Path, truth: Path, predicted: dict[str, Detections], tmp_path: Path
) -> None:
    names = Counter(name for found in predicted.values() for name in found.categories)
    ((lost, count),) = names.most_common(1)
    categories = [{"id": index, "name": "cube" if name == lost else name} for name, index in IDS.items()]
    config = altered(truth, tmp_path, categories=categories)
    found = evaluate(EvaluateConfig(annotations=config.annotations, results=str(table)))
    assert (found.categories_missing, found.num_unknown_instances) == (["cube"], count)
    assert found.scores["bbox"].per_category["cube"] == 0
    config = altered(truth, tmp_path, categories=[{"id": index, "name": f"c{index}"} for index in IDS.values()])
    with pytest.raises(ConfigError, match="share no category: the network has disc, ring, square, star, triangle"):
        evaluate(EvaluateConfig(annotations=config.annotations, results=str(table)))


def test_boxes_alone_are_scored_where_the_annotations_have_no_masks(table: Path, truth: Path, tmp_path: Path) -> None:
    objects = json.loads(truth.read_text())["annotations"]
    config = altered(truth, tmp_path, annotations=[{**one, "segmentation": []} for one in objects])
    found = evaluate(EvaluateConfig(annotations=config.annotations, results=str(table)))
    expected = evaluate(EvaluateConfig(annotations=str(truth), results=str(table)))
    assert set(found.scores) == {"bbox"}
    assert found.scores["bbox"].stats == pytest.approx(expected.scores["bbox"].stats, nan_ok=True)
    assert found.notes()[0].startswith("segm is not scored:")


def test_keys_that_fit_twice_need_a_prefix(truth: Path, predicted: dict[str, Detections], tmp_path: Path) -> None:
    rows: dict[str, Detections | DecodeError] = {f"/one/{name}": found for name, found in predicted.items()}
    rows |= {"/two/loose/00/scene_00000.jpg": DecodeError("unreadable", "no image")}
    write_results(tmp_path, rows, CATEGORIES)
    with pytest.raises(ConfigError, match=r"loose/00/scene_00000\.jpg and .*--image-prefix"):
        evaluate(EvaluateConfig(annotations=str(truth), results=str(tmp_path)))
    one, two = (
        evaluate(EvaluateConfig(annotations=str(truth), results=str(tmp_path), image_prefix=prefix))
        for prefix in ("/one", "/two/")
    )
    assert (one.images_failed, one.images_missing) == ([], [])
    assert two.images_failed == ["loose/00/scene_00000.jpg"]
    assert len(two.images_missing) == 7
    assert "(1 unreadable)" in "\n".join(two.notes())
    assert [found.stats["AP"] for found in two.scores.values()] == [0, 0]


def test_keypoints_are_scored_where_both_have_them(truth: Path, tmp_path: Path) -> None:
    document = json.loads(truth.read_text())
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {image["file_name"]: [] for image in document["images"]}
    names = {image["id"]: image["file_name"] for image in document["images"]}
    for one in document["annotations"]:
        points = rng.uniform(0, 200, (17, 3)).round(2)
        points[:, 2] = 2
        one |= {"category_id": 1, "keypoints": points.ravel().tolist(), "num_keypoints": 17}
        rows[names[one["image_id"]]].append(one)
    document["categories"] = [{"id": 1, "name": "person", "keypoints": [f"point {index}" for index in range(17)]}]
    found: dict[str, Detections | DecodeError] = {
        f"/d/{image['file_name']}": as_detections(ImageSize(image["height"], image["width"]), rows[image["file_name"]])
        for image in document["images"]
    }
    write_results(tmp_path / "out", found, ["person"])
    path = tmp_path / "people.json"
    path.write_text(json.dumps(document))
    evaluation = evaluate(EvaluateConfig(annotations=str(path), results=str(tmp_path / "out")))
    assert set(evaluation.scores) == {"bbox", "keypoints"}  # the table has no masks
    assert tuple(evaluation.scores["keypoints"].stats) == STAT_NAMES["keypoints"]
    assert evaluation.scores["keypoints"].stats["AP"] == pytest.approx(1)
    del document["categories"][0]["keypoints"]
    path.write_text(json.dumps(document))
    without = evaluate(EvaluateConfig(annotations=str(path), results=str(tmp_path / "out")))
    assert set(without.scores) == {"bbox"}
    assert without.notes()[0].startswith("keypoints is not scored:")


def as_detections(size: ImageSize, annotations: list[dict[str, Any]]) -> Detections:
    """What finds all of these people, and no mask."""
    count = len(annotations)
    boxes = np.array([one["bbox"] for one in annotations], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        size=size,
        boxes=boxes,
        scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
        category_ids=np.ones(count, np.int64),
        categories=["person"] * count,
        masks=[],
        areas=np.zeros(count, np.int64),
        keypoints=np.array([one["keypoints"] for one in annotations], np.float32).reshape(count, -1, 3),
    )


def test_it_prints_tables_that_fit(
    table: Path, truth: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.evaluation.CATEGORY_LINES", 3)
    main(EvaluateConfig(annotations=str(truth), results=str(table)))
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert [row[0] for row in rows] == [*STAT_NAMES["bbox"], *sorted(CATEGORIES)[:3]]
    assert "… 2 more, see --json" in shown
    assert "nan" not in shown
    assert "-1" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --results, to score a table, or --images and --weights, to run .* are missing"),
        ({"images": "a"}, "--weights is missing"),
        ({"weights": "a"}, "--images is missing"),
        ({"results": "a", "images": "b"}, "not both"),
        ({"results": "a", "weights": "b"}, "not both"),
        ({"images": "a", "weights": "b", "image_prefix": "c"}, "image_prefix goes with --results"),
        ({"results": "a", "score_threshold": 1.0}, r"score_threshold must lie in \[0, 1\), got 1.0"),
        ({"images": "a", "weights": "b", "actors": "few"}, "got 'few'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(annotations="a.json", **options)


def test_a_wrong_request_exits_2(table: Path, truth: Path, tmp_path: Path) -> None:
    refused = run_evaluate("--annotations", truth, "--results", table, "--weights", "coco")
    assert refused.returncode == 2
    assert refused.stderr == (
        "maskline evaluate: give either --results, to score a table, or --images and --weights, not both\n"
    )
    with pytest.raises(ConfigError, match="not a results table"):
        evaluate(EvaluateConfig(annotations=str(truth), results=str(tmp_path)))
    config = altered(truth, tmp_path, images=[
        image | {"file_name": f"other-{image['id']}.jpg"} for image in json.loads(truth.read_text())["images"]
    ])  # fmt: skip
    with pytest.raises(ConfigError, match=r"no row of .*the annotations have 'other-1.jpg' and 7 more"):
        evaluate(EvaluateConfig(annotations=config.annotations, results=str(table)))

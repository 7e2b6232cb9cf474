"""COCO files: each kind of defect by hand, masks as pycocotools draws them, and no garbage that goes unnoticed."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.rle import decode
from model.structures import ImageSize, Rle
from pipeline import storage
from pipeline.coco import CocoDataset, find_missing_files, read_coco
from pipeline.coco_defects import MAX_EXAMPLES, Defects
from pipeline.coco_ground_truth import ground_truth
from pipeline.errors import ConfigError
from tests.model.conftest import DATA

IMAGE_KINDS = {"bad_image", "duplicate_image_id", "duplicate_file_name", "missing_file"}
SQUARE = [[2, 3, 8, 3, 8, 9, 2, 9]]  # x 2 to 8, y 3 to 9
KEYPOINTS = frozenset({"masks", "keypoints"})


def square_runs() -> list[int]:
    """SQUARE in 20 rows and 30 columns, down the columns: the rows 3 to 8 of the columns 2 to 7."""
    return [2 * 20 + 3, *[6, 14] * 5, 6, 11 + 22 * 20]


def compressed(mask: NDArray[Any]) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def annotation(annotation_id: int, **fields: Any) -> dict[str, Any]:
    """SQUARE on image 1."""
    given = {"id": annotation_id, "image_id": 1, "category_id": 7, "bbox": [2, 3, 6, 6], "segmentation": SQUARE}
    return {**given, "area": 36, "iscrowd": 0, **fields}


def document(*annotations: Any, **fields: Any) -> dict[str, Any]:
    """Image 1 of 20 x 30 pixels, image 2 without objects, category 7, annotation 100, and the given ones."""
    images = [
        {"id": 1, "file_name": "one.jpg", "height": 20, "width": 30},
        {"id": 2, "file_name": "sub/two.jpg", "height": 50, "width": 40},
    ]
    whole = {"images": images, "annotations": [annotation(100), *annotations], "categories": [{"id": 7, "name": "cat"}]}
    return {**whole, **fields}


def read(tmp_path: Path, content: Any, **options: Any) -> CocoDataset:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return read_coco(str(path), **options)


def kept(dataset: CocoDataset) -> list[int]:
    return [annotation.annotation_id for image in dataset.images for annotation in image.annotations]


def test_what_the_file_says_is_what_leaves(tmp_path: Path) -> None:
    dataset = read(tmp_path, document(categories=[{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}]))
    assert [(image.image_id, image.file_name, image.size) for image in dataset.images] == [
        (1, "one.jpg", ImageSize(20, 30)),
        (2, "sub/two.jpg", ImageSize(50, 40)),
    ]
    assert list(dataset.categories.items()) == [(7, "cat"), (9, "dog")]
    assert (dataset.num_keypoints, len(dataset.defects), dataset.images[1].annotations) == (0, 0, ())
    (found,) = dataset.images[0].annotations
    assert (found.annotation_id, found.category_id, found.box, found.area) == (100, 7, (2, 3, 8, 9), 36)
    assert (found.is_crowd, found.segmentation, found.keypoints) == (False, SQUARE, None)


BAD_ANNOTATIONS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("bad_annotation", 17, ("place 1", "17")),
    ("bad_annotation", annotation(5) | {"id": "5"}, ("place 1", "'5'")),
    ("bad_annotation", annotation(5) | {"id": True}, ("place 1", "True")),
    ("bad_annotation", annotation(5, iscrowd="no"), ("annotation 5 of image 1", "'no'")),
    ("duplicate_annotation_id", annotation(100), ("annotation 100 of image 1",)),
    ("unknown_image", annotation(5, image_id=33), ("annotation 5", "33")),
    ("unknown_image", annotation(5, image_id="1"), ("annotation 5", "'1'")),
    ("unknown_image", annotation(5, image_id=[1]), ("annotation 5", "[1]")),
    ("unknown_category", annotation(5, category_id=8), ("annotation 5 of image 1", "8")),
    ("unknown_category", annotation(5, category_id=None), ("annotation 5 of image 1", "None")),
    ("bad_box", {key: value for key, value in annotation(5).items() if key != "bbox"}, ("annotation 5", "None")),
    ("bad_box", annotation(5, bbox=[1, 2, 3]), ("annotation 5", "[1, 2, 3]")),
    ("bad_box", annotation(5, bbox=[1, 2, 3, float("nan")]), ("annotation 5", "nan")),
    ("bad_box", annotation(5, bbox=[1, 2, 3, 10**400]), ("annotation 5",)),
    ("bad_box", annotation(5, bbox=[1, 2, 3, "4"]), ("annotation 5", "'4'")),
    ("zero_area", annotation(5, bbox=[1, 2, 0, 4]), ("annotation 5", "[1, 2, 0, 4]")),
    ("zero_area", annotation(5, bbox=[1, 2, 3, -4]), ("annotation 5", "-4")),
    ("zero_area", annotation(5, bbox=[29, 2, 1e-9, 4]), ("annotation 5", "1e-09")),
    ("outside_image", annotation(5, bbox=[30, 2, 5, 5]), ("annotation 5", "[30, 2, 5, 5]", "30 x 20")),
    ("outside_image", annotation(5, bbox=[2, -9, 5, 9]), ("annotation 5", "[2, -9, 5, 9]")),
    ("bad_segmentation", annotation(5, segmentation=None), ("annotation 5", "missing", "None")),
    ("bad_segmentation", annotation(5, segmentation=[]), ("annotation 5", "missing", "[]")),
    ("bad_segmentation", annotation(5, segmentation="x"), ("annotation 5", "'x'")),
    ("bad_segmentation", annotation(5, segmentation=[1, 2, 3, 4, 5, 6]), ("annotation 5", "int: 1")),
    ("bad_segmentation", annotation(5, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), ("annotation 5", "7 values")),
    ("bad_segmentation", annotation(5, segmentation=[[1, 2, 3, 4]]), ("annotation 5", "4 values", "[1, 2, 3, 4]")),
    ("bad_segmentation", annotation(5, segmentation=[*SQUARE, [1, 2, 3, 4, 5, "6"]]), ("annotation 5", "'6'")),
    ("bad_segmentation", annotation(5, segmentation=[[1, 2, 3, float("nan"), 5, 6]]), ("annotation 5", "nan")),
    ("bad_segmentation", annotation(5, segmentation=[[1, 2, 3, 1e300, 5, 6]]), ("annotation 5", "1e+300")),
    ("zero_area", annotation(5, segmentation=[[1, 1, 9, 9, 17, 17]]), ("annotation 5", "no pixel", "17")),
    ("zero_area", annotation(5, segmentation=[[1.1, 1, 1.2, 1, 1.2, 19, 1.1, 19]]), ("annotation 5", "1.1")),
    ("zero_area", annotation(5, segmentation=[[40, 1, 60, 1, 60, 20]]), ("annotation 5", "40")),
    ("bad_segmentation", annotation(5, segmentation={"size": [30, 20], "counts": [600]}), ("[20, 30]", "[30, 20]")),
    ("bad_segmentation", annotation(5, segmentation={"size": [20, 30]}), ("annotation 5", "None")),
    ("bad_segmentation", annotation(5, segmentation={"size": [20, 30], "counts": [3, 4]}), ("600", "7")),
    ("bad_segmentation", annotation(5, segmentation={"size": [20, 30], "counts": [601, -1]}), ("601", "-1")),
    ("bad_segmentation", annotation(5, segmentation={"size": [20, 30], "counts": [599.0, 1]}), ("599.0",)),
    ("bad_segmentation", annotation(5, segmentation={"size": [20, 30], "counts": "hello"}), ("'hello'",)),
    ("bad_segmentation", annotation(5, segmentation={"size": [20, 30], "counts": "PPPPPPPPP0"}), ("'PPPPPPPPP0'",)),
    ("bad_segmentation", annotation(5, segmentation={"size": [20, 30], "counts": "é"}), ("'é'",)),
    ("zero_area", annotation(5, segmentation={"size": [20, 30], "counts": [600]}), ("annotation 5", "[600]")),
    ("zero_area", annotation(5, segmentation=compressed(np.zeros((20, 30)))), ("annotation 5",)),
    ("bad_segmentation", annotation(5, iscrowd=1, segmentation={"size": [20, 30], "counts": [1]}), ("600", "1")),
]


@pytest.mark.parametrize(("kind", "bad", "texts"), BAD_ANNOTATIONS)
def test_a_bad_annotation_is_named_and_counted_under_one_kind(
    tmp_path: Path, kind: str, bad: Any, texts: tuple[str, ...]
) -> None:
    dataset = read(tmp_path, document(bad, annotation(200)))
    assert dataset.defects.counts == {kind: 1}
    (example,) = dataset.defects.examples[kind]
    assert [text for text in texts if text not in example] == []
    assert kept(dataset) == [100, 200]


@pytest.mark.parametrize(
    ("kind", "bad", "texts"),
    [
        ("bad_image", "x", ("place 2", "'x'")),
        ("bad_image", {"id": "3", "file_name": "3.jpg", "height": 5, "width": 5}, ("place 2", "'3'")),
        ("bad_image", {"id": 3, "height": 5, "width": 5}, ("image 3", "file_name", "None")),
        ("bad_image", {"id": 3, "file_name": "3.jpg", "width": 5}, ("image 3", "height", "None")),
        ("bad_image", {"id": 3, "file_name": "3.jpg", "height": 5, "width": 0}, ("image 3", "width", "0")),
        ("bad_image", {"id": 3, "file_name": "3.jpg", "height": 5.5, "width": 5}, ("image 3", "height", "5.5")),
        ("bad_image", {"id": 3, "file_name": "3.jpg", "height": 100_000, "width": 90_000}, ("100000 x 90000",)),
        ("duplicate_image_id", {"id": 1, "file_name": "3.jpg", "height": 5, "width": 5}, ("image 1", "'one.jpg'")),
        ("duplicate_file_name", {"id": 3, "file_name": "./sub//two.jpg", "height": 5, "width": 5}, ("image 3", "two")),
    ],
)
def test_a_bad_image_is_named_and_its_annotations_too(
    tmp_path: Path, kind: str, bad: Any, texts: tuple[str, ...]
) -> None:
    content = document(annotation(5, image_id=3))
    content["images"].append(bad)
    dataset = read(tmp_path, content)
    assert dataset.defects.counts == {kind: 1, "unknown_image": 1}
    assert [text for text in texts if text not in dataset.defects.examples[kind][0]] == []
    assert "annotation 5" in dataset.defects.examples["unknown_image"][0]
    assert [image.file_name for image in dataset.images] == ["one.jpg", "sub/two.jpg"]


@pytest.mark.parametrize(
    "bad", [{"id": 7, "name": "dog"}, {"id": "8", "name": "dog"}, {"id": 8}, {"id": 8, "name": "dog", "keypoints": 3}]
)
def test_a_bad_category_is_named(tmp_path: Path, bad: Any) -> None:
    dataset = read(tmp_path, document(categories=[{"id": 7, "name": "cat"}, bad]))
    assert dataset.defects.counts == {"bad_category": 1}
    assert dataset.categories == {7: "cat"}
    assert dataset.defects.examples["bad_category"][0].startswith("category")


@pytest.mark.parametrize(
    ("box", "clipped"),
    [([-5, 3, 10, 6], (0, 3, 5, 9)), ([25.5, 15, 10, 10], (25.5, 15, 30, 20)), ([-1e9, -1, 2e9, 30], (0, 0, 30, 20))],
)
def test_a_box_partly_outside_is_clipped(tmp_path: Path, box: list[float], clipped: tuple[float, ...]) -> None:
    dataset = read(tmp_path, document(annotation(5, bbox=box)))
    assert len(dataset.defects) == 0
    assert dataset.images[0].annotations[1].box == clipped


@pytest.mark.parametrize("area", [None, "big", 0, -3, float("nan")])
def test_an_area_that_is_none_is_the_box_s(tmp_path: Path, area: Any) -> None:
    dataset = read(tmp_path, document(annotation(5, bbox=[1, 2, 3, 4], area=area)))
    assert dataset.images[0].annotations[1].area == 3 * 4


def test_one_shape_in_every_form_gives_one_mask(tmp_path: Path) -> None:
    expected = np.zeros((20, 30), bool)
    expected[3:9, 2:8] = True
    forms = [SQUARE, {"size": [20, 30], "counts": square_runs()}, compressed(expected)]
    forms.append([[2, 3, 8, 3, 8, 6, 2, 6], [2, 6, 8, 6, 8, 9, 2, 9]])  # two halves
    forms.append([[2, 3, 8, 9, 2, 9], [2, 3, 8, 3, 8, 9]])
    dataset = read(tmp_path, document(*[annotation(index, segmentation=form) for index, form in enumerate(forms, 1)]))
    assert len(dataset.defects) == 0
    truth = ground_truth(dataset.images[0], {7: 1}, with_masks=True, num_keypoints=0)
    assert [type(mask["counts"]) for mask in masks_of(truth.masks)] == [bytes] * 6
    for mask in masks_of(truth.masks)[:-1]:
        assert np.array_equal(decode(mask), expected)
    assert_masks_are_pycocotools(tmp_path / "instances.json", dataset, num_images=1)


def masks_of(masks: Any) -> list[Rle]:
    assert isinstance(masks, list)
    return masks


def assert_masks_are_pycocotools(path: Path, dataset: CocoDataset, *, num_images: int) -> None:
    """Of the first images: equal to those of the file as pycocotools reads it, and of the dataset as its index."""
    labels = {category_id: index for index, category_id in enumerate(dataset.categories, 1)}
    with contextlib.redirect_stdout(io.StringIO()):
        indices = (COCO(str(path)), dataset.coco())
    for image in dataset.images[:num_images]:
        objects = [item for item in image.annotations if not item.is_crowd]
        truth = ground_truth(image, labels, with_masks=True, num_keypoints=0)
        for item, mask in zip(objects, masks_of(truth.masks), strict=True):
            for index in indices:
                assert np.array_equal(decode(mask), index.annToMask(index.anns[item.annotation_id]))


def test_ground_truth_has_the_objects_and_the_crowds(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "cat", "keypoints": ["nose", "tail"]}, {"id": 9, "name": "dog"}]
    points = [1.5, 2, 2, 3, 4, 1]
    crowd = annotation(6, iscrowd=1, bbox=[10, 0, 30, 5], segmentation=[])
    dataset = read(
        tmp_path,
        document(annotation(5, category_id=9, keypoints=points), crowd, categories=categories),
        wanted=KEYPOINTS,
    )
    assert (dataset.num_keypoints, len(dataset.defects), kept(dataset)) == (2, 0, [100, 5, 6])
    truth = ground_truth(dataset.images[0], {7: 3, 9: 1}, with_masks=False, num_keypoints=2)
    assert truth.boxes.dtype == torch.float32
    assert truth.boxes.tolist() == [[2, 3, 8, 9]] * 2
    assert truth.labels.dtype == torch.int64
    assert truth.labels.tolist() == [3, 1]
    assert truth.masks is None
    assert truth.keypoints is not None
    assert truth.keypoints.tolist() == [[[0, 0, 0], [0, 0, 0]], [[1.5, 2, 2], [3, 4, 1]]]
    assert truth.crowd_boxes is not None
    assert truth.crowd_boxes.tolist() == [[10, 0, 30, 5]]
    with pytest.raises(ConfigError, match="category 9, that of annotation 5 of image 1"):
        ground_truth(dataset.images[0], {7: 3}, with_masks=True, num_keypoints=0)


def test_an_image_without_objects_has_empty_ground_truth(tmp_path: Path) -> None:
    truth = ground_truth(read(tmp_path, document()).images[1], {7: 1}, with_masks=True, num_keypoints=3)
    assert truth.keypoints is not None
    assert truth.crowd_boxes is not None
    shapes = (truth.boxes.shape, truth.labels.shape, truth.keypoints.shape, truth.crowd_boxes.shape)
    assert shapes == ((0, 4), (0,), (0, 3, 3), (0, 4))
    assert truth.masks == []


@pytest.mark.parametrize("points", [[1, 2], [1, 2, 2, 3, 4, float("nan")], [1, 2, 2, 3, 4, "1"], "x", {"x": 1}])
def test_bad_keypoints_are_named_when_wanted(tmp_path: Path, points: Any) -> None:
    content = document(annotation(5, keypoints=points), categories=[{"id": 7, "name": "a", "keypoints": ["b", "c"]}])
    dataset = read(tmp_path, content, wanted=KEYPOINTS)
    assert dataset.defects.counts == {"bad_keypoints": 1}
    assert "annotation 5 of image 1" in dataset.defects.examples["bad_keypoints"][0]
    assert kept(read(tmp_path, content)) == [100, 5]


def test_what_is_not_wanted_is_not_required(tmp_path: Path) -> None:
    dataset = read(
        tmp_path, document(annotation(5, segmentation=[]), annotation(6, segmentation=[[1]])), wanted=frozenset()
    )
    assert (kept(dataset), len(dataset.defects)) == ([100, 5, 6], 0)
    assert [item.segmentation for item in dataset.images[0].annotations] == [None] * 3
    with pytest.raises(ValueError, match="annotation 100 has no mask"):
        ground_truth(dataset.images[0], {7: 1}, with_masks=True, num_keypoints=0)


@pytest.mark.parametrize(("nums", "found"), [((0, 0), "no"), ((17, 5), "5 and 17")])
def test_keypoints_need_one_number_of_them(tmp_path: Path, nums: tuple[int, int], found: str) -> None:
    categories = [{"id": 7 + index, "name": "a", "keypoints": ["k"] * num} for index, num in enumerate(nums)]
    with pytest.raises(ConfigError, match=f"have {found} keypoints"):
        read(tmp_path, document(categories=categories), wanted=KEYPOINTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xd8\xff\xe0 a photograph", "is not JSON"),
        (b'{"images": [', "is not JSON"),
        (b"", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (gzip.compress(b"{}", mtime=0)[:-9], "is not JSON"),
        (b"[]", "holds a list"),
        (b'{"annotations": [], "categories": []}', "a list of images, got nothing"),
        (b'{"images": [], "annotations": {}, "categories": []}', "a list of annotations, got dict"),
        (b'{"images": [], "annotations": [], "categories": []}', "no usable image .*0 images and 0 annotations"),
        (json.dumps(document(annotations=[])).encode(), "no usable annotation .*2 images"),
        (json.dumps(document(annotations=[annotation(5, bbox=[])])).encode(), "(?s)no usable annotation.*1 bad_box: "),
        (json.dumps(document(images=[{"id": 1}])).encode(), "(?s)no usable image .*1 bad_image: image 1"),
    ],
)
def test_a_file_that_cannot_be_used_names_itself(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_coco(str(path))
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_names_itself(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(ConfigError, match=str(path)) as caught:
            read_coco(str(path))
        assert isinstance(caught.value.__cause__, OSError)


def test_gzip_and_memory_are_read_alike(tmp_path: Path, memory_root: str) -> None:
    uri = storage.join(memory_root, "instances.json.gz")
    storage.write_bytes(uri, gzip.compress(json.dumps(document()).encode()))
    assert read_coco(uri) == read(tmp_path, document())


def test_missing_files_are_named_and_their_images_left_out(tmp_path: Path, store: str) -> None:
    dataset = read(tmp_path, document(annotation(5, image_id=2)))
    storage.write_bytes(storage.join(store, "two.jpg"), b"not in sub/")
    storage.write_bytes(storage.join(store, "one.jpg.txt"), b"")
    with pytest.raises(ConfigError, match=r"(?s)no usable image.*file_name is relative to.*2 missing_file"):
        find_missing_files(dataset, store)
    storage.write_bytes(storage.join(store, "sub/two.jpg"), b"x")
    found = find_missing_files(dataset, store + "/")
    assert [image.image_id for image in found.images] == [2]
    assert found.defects.counts == {"missing_file": 1}
    assert "image 1 with 1 annotations: 'one.jpg'" in found.defects.examples["missing_file"][0]
    assert len(dataset.defects) == 0  # the other dataset's own
    storage.write_bytes(storage.join(store, "one.jpg"), b"x")
    assert find_missing_files(dataset, store) == dataset


def test_a_link_to_nowhere_is_a_missing_file(tmp_path: Path) -> None:
    dataset = read(tmp_path, document())
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "one.jpg").write_bytes(b"x")
    (folder / "sub" / "two.jpg").symlink_to("nowhere")
    assert find_missing_files(dataset, str(folder)).defects.counts == {"missing_file": 1}


def test_defects_count_all_and_keep_a_few() -> None:
    defects = Defects()
    for index in range(1234):
        defects.add("zero_area", f"annotation {index}")
    defects.add("bad_box", "annotation 9999")
    assert (len(defects), defects.counts) == (1235, {"zero_area": 1234, "bad_box": 1})
    assert defects.examples["zero_area"] == [f"annotation {index}" for index in range(MAX_EXAMPLES)]
    assert defects.lines()[:2] == ["zero_area: 1,234", "  annotation 0"]
    assert str(defects).endswith(f"  and {1234 - MAX_EXAMPLES:,} more\nbad_box: 1\n  annotation 9999")
    assert json.loads(json.dumps(defects.to_json()))["bad_box"] == {"count": 1, "examples": ["annotation 9999"]}


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_a_perfect_answer_scores_one(tmp_path: Path, iou_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with an object of id 0, a crowd without mask and one without keypoints, over which COCOeval stumbles."""
    points = [v for index in range(17) for v in (2 + index % 6, 3 + index % 5, 2)]
    objects = [annotation(0, image_id=2, keypoints=points, area=2000), annotation(5, iscrowd=1, segmentation=None)]
    categories = [{"id": 7, "name": "person", "keypoints": ["k"] * 17}]
    content = document(*objects, categories=categories)
    content["annotations"][0].update(area=2000, keypoints=points)
    dataset = read(tmp_path, content, wanted=KEYPOINTS)
    index = dataset.coco()
    assert capsys.readouterr().out == ""
    assert sorted(index.anns) == [5, 100, 101]
    answers = [
        {
            "image_id": image.image_id, "category_id": 7, "score": 1.0, "bbox": [2, 3, 6, 6], "keypoints": points,
            "segmentation": ground_truth(image, {7: 1}, with_masks=True, num_keypoints=0).masks[0],  # type: ignore[index]
        }
        for image in dataset.images
    ]  # fmt: skip
    fields = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
    answers = [{key: a[key] for key in ("image_id", "category_id", "score", fields[iou_type])} for a in answers]
    with contextlib.redirect_stdout(io.StringIO()):
        scoring = COCOeval(index, index.loadRes(answers), iou_type)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    assert scoring.stats[0] == pytest.approx(1.0)


numbers = st.one_of(
    st.integers(-50, 50), st.floats(-60, 60), st.floats(), st.sampled_from([10**400, -(2**63), 199_999, 1e-300])
)
scalars = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=6))
garbage = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
polygons = st.lists(st.lists(numbers, min_size=4, max_size=12) | garbage, max_size=3)
coco_text = st.text(st.characters(min_codepoint=44, max_codepoint=115), max_size=12)
run_lengths = st.fixed_dictionaries(
    {
        "size": st.just([20, 30]) | garbage,
        "counts": coco_text | st.just(square_runs()) | st.lists(st.integers(-5, 600), max_size=4) | garbage,
    }
)
cut = st.integers(0, 599).flatmap(lambda a: st.integers(0, 600 - a).map(lambda b: [a, b, 600 - a - b]))
valid_run_lengths = cut.map(lambda counts: {"size": [20, 30], "counts": counts})
noisy = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 4) | garbage,
        "image_id": st.sampled_from([1, 2, 3]) | garbage,
        "category_id": st.sampled_from([7, 8]) | garbage,
        "bbox": st.lists(numbers, min_size=4, max_size=4) | garbage,
        "segmentation": polygons | run_lengths | valid_run_lengths | garbage,
        "keypoints": st.lists(numbers, min_size=6, max_size=6) | garbage,
        "iscrowd": st.sampled_from([0, 1]) | garbage,
        "area": numbers | garbage,
    },
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coco")


@settings(max_examples=100, deadline=None)
@given(entries=st.lists(st.tuples(noisy, st.booleans()), max_size=6), odd=st.lists(garbage, max_size=2))
def test_garbage_is_counted_and_nothing_else_happens(
    scratch: Path, entries: list[tuple[dict[str, Any], bool]], odd: list[Any]
) -> None:
    """What passes can be drawn, and scored against, by native code that checks nothing."""
    noisy_ones = [{**annotation(index), **fields} if whole else fields for index, (fields, whole) in enumerate(entries)]
    content = document(*noisy_ones, *odd, categories=[{"id": 7, "name": "cat", "keypoints": ["nose", "tail"]}])
    dataset = read(scratch, content, wanted=KEYPOINTS)
    unusable = sum(count for kind, count in dataset.defects.counts.items() if kind not in IMAGE_KINDS)
    assert len(kept(dataset)) + unusable == len(content["annotations"])
    assert 100 in kept(dataset)
    index = dataset.coco()
    for image in dataset.images:
        truth = ground_truth(image, {7: 1}, with_masks=True, num_keypoints=2)
        assert (truth.boxes[:, 2:] > truth.boxes[:, :2]).all()
        for mask in masks_of(truth.masks):
            assert decode(mask).any()
    for item in index.anns.values():
        index.annToMask(item)


@settings(max_examples=60, deadline=None)
@given(content=garbage | st.fixed_dictionaries({name: st.lists(garbage, max_size=3) for name in document()}))
def test_a_document_of_garbage_is_a_config_error(scratch: Path, content: Any) -> None:
    with pytest.raises(ConfigError):
        read(scratch, content)


@settings(max_examples=100, deadline=None)
@given(mask=st.integers(1, 2**24 - 1), swap=st.tuples(st.integers(0, 200), st.characters(codec="ascii")))
def test_a_run_length_string_passes_only_if_it_fills_the_image(scratch: Path, mask: int, swap: tuple[int, str]) -> None:
    """Any bitmap of 4 x 6 passes; with one character changed it is drawn with the same number of pixels, or refused."""
    bits = np.array([mask >> bit & 1 for bit in range(24)]).reshape(4, 6)
    whole = compressed(bits)
    text = whole["counts"]
    place = swap[0] % len(text)
    changed = {**whole, "counts": text[:place] + swap[1] + text[place + 1 :]}
    image = {"id": 1, "file_name": "x", "height": 4, "width": 6}
    items = [
        annotation(1, bbox=[0, 0, 6, 4], segmentation=whole),
        annotation(2, bbox=[0, 0, 6, 4], segmentation=changed),
    ]
    dataset = read(scratch, document(images=[image], annotations=items))
    truth = ground_truth(dataset.images[0], {7: 1}, with_masks=True, num_keypoints=0)
    masks = masks_of(truth.masks)
    assert np.array_equal(decode(masks[0]), bits)
    for rle in masks:
        assert decode(rle).any()
        assert coco_mask.decode(rle).sum() == decode(rle).sum()


@pytest.mark.parametrize(
    ("name", "num_images", "num_annotations"),
    [
        ("nuclei/instances_train.json", 451, 21_477),
        ("nuclei/instances_val.json", 70, 2_588),
        ("coco100/instances_train2017.json", 100, 746),
    ],
)  # DATA's README
def test_real_files_have_no_defects(name: str, num_images: int, num_annotations: int) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"no {DATA / name}")
    dataset = read_coco(str(DATA / name))
    assert str(dataset.defects) == ""
    assert (len(dataset.images), len(kept(dataset))) == (num_images, num_annotations)
    assert_masks_are_pycocotools(DATA / name, dataset, num_images=5)
    assert find_missing_files(dataset, str((DATA / name).parent / "images")) == dataset

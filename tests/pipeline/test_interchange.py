"""Tables in supervision and FiftyOne, by the libraries themselves where they are installed; masks as pycocotools has
them."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.structures import Detections, ImageSize
from pipeline.errors import ConfigError, DecodeError
from pipeline.interchange import _whole, to_fiftyone, to_supervision
from pipeline.results import Results, open_results
from tests.pipeline.archives import tar_bytes
from tests.pipeline.made_up_tables import CATEGORIES, SIZE, add_detections, add_run, write_images

ODD = ImageSize(49, 93)
"""Where 49 * (1 / 49) < 1, and so for many more pixels of either axis."""

Mask = NDArray[np.bool_]


def blob(size: ImageSize, y1: int, x1: int, y2: int, x2: int) -> Mask:
    """A rectangle with a hole, all set but one pixel in three."""
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    mask[y1 + 1 : y2 - 1 : 3, x1 + 1 : x2 - 1] = False
    return mask


def detections(size: ImageSize, boxes: list[list[float]], masks: list[Mask] | None) -> Detections:
    count = len(boxes)
    ids = np.arange(count) % 2 + 1
    encoded = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks or []]
    return Detections(
        size=size, boxes=np.array(boxes, np.float32).reshape(-1, 4), category_ids=ids, masks=encoded,
        scores=np.linspace(0.9, 0.3, count, dtype=np.float32), categories=[CATEGORIES[one] for one in ids.tolist()],
        areas=np.array([mask.sum() for mask in masks or []] or [0] * count, np.int64),
    )  # fmt: skip


def edges(size: ImageSize) -> Detections:
    """Boxes at every edge, of part of a pixel, without width, of everything; a mask beyond its box, an empty one."""
    h, w = size
    boxes: list[list[float]] = [
        [0, 0, w, h],
        [0.25, 0.5, 7.75, 9.1],
        [w - 9.3, h - 8.6, w, h],
        [20.2, 10.9, 20.7, 11.4],
        [w, 5, w, 9],
        [30.1, 20.2, 40.9, 30.8],
        [10.5, 30.5, 18.5, 36.5],
    ]
    masks = [
        blob(size, 0, 0, h, w),
        blob(size, 0, 0, 10, 8),
        blob(size, h - 9, w - 10, h, w),
        blob(size, 10, 20, 12, 21),
        blob(size, 5, w - 1, 9, w),
        blob(size, 17, 28, 33, 44),
        np.zeros(size, bool),
    ]
    return detections(size, boxes, masks)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("interchange")
    write_images(root / "archive", ["bad.png", "bare.dib", "edges.png", "empty.png", "odd.webp"])
    chance = np.random.default_rng(0)
    corners = np.sort(chance.uniform(0, 49, (12, 2, 2)), axis=1).reshape(12, 4).tolist()
    given: dict[str, Detections | DecodeError] = {
        "bad.png": DecodeError("truncated", "cut"),
        "bare.dib": detections(SIZE, [[3.25, 4.5, 60.125, 44]], None),
        "edges.png": edges(SIZE),
        "empty.png": detections(SIZE, [], []),
        "odd.webp": detections(ODD, corners, [chance.random(ODD) < 0.01 for _ in corners]),
    }
    add_detections(str(root / "out"), "r1", str(root / "archive"), given)
    return open_results(str(root / "out"))


def rows_of(table: Results, name: str) -> pa.Table:
    return table.instances().to_table(filter=pc.ends_with(pc.field("image_key"), f"/{name}"))


def decoded(row: dict[str, Any]) -> Mask:
    mask: Mask = coco_mask.decode({"size": [row["mask_height"], row["mask_width"]], "counts": row["mask_rle"]}) > 0
    return mask


# -------------------------------------------------------------------------------------------------------- supervision


@pytest.mark.parametrize("name", ["edges.png", "odd.webp"])
def test_supervision_has_the_rows_to_the_last_bit(table: Results, name: str) -> None:
    sv = pytest.importorskip("supervision")
    rows = rows_of(table, name)
    found = to_supervision(rows)
    assert isinstance(found, sv.Detections)
    assert len(found) == rows.num_rows > 1
    assert (found.xyxy.dtype, found.mask.dtype, found.confidence.dtype) == (np.float32, np.bool_, np.float32)
    for (xyxy, mask, confidence, class_id, _, data), row in zip(found, rows.to_pylist(), strict=True):
        assert xyxy.tolist() == [row[side] for side in ("x1", "y1", "x2", "y2")]
        assert np.array_equal(mask, decoded(row))
        assert (float(confidence), int(class_id)) == (row["score"], row["category_id"])
        assert data["class_name"] == row["category"]


def test_supervision_draws_what_it_gets(table: Results) -> None:
    sv = pytest.importorskip("supervision")
    found = to_supervision(rows_of(table, "edges.png"))[[5]]
    annotator = sv.MaskAnnotator(color=sv.Color(255, 255, 255), opacity=1.0)
    drawn = annotator.annotate(np.zeros((*SIZE, 3), np.uint8), found)
    assert np.array_equal(drawn.any(axis=2), blob(SIZE, 17, 28, 33, 44))


def test_an_image_without_instances_is_empty_in_supervision(table: Results) -> None:
    sv = pytest.importorskip("supervision")
    rows = rows_of(table, "empty.png")
    assert rows.num_rows == 0
    assert to_supervision(rows) == sv.Detections.empty()
    merged = sv.Detections.merge([to_supervision(rows), to_supervision(rows_of(table, "edges.png"))])
    assert merged == to_supervision(rows_of(table, "edges.png"))


def test_instances_without_masks_have_none_in_supervision(table: Results) -> None:
    pytest.importorskip("supervision")
    found = to_supervision(rows_of(table, "bare.dib"))
    assert found.mask is None
    assert found.xyxy.tolist() == [[3.25, 4.5, 60.125, 44]]
    rows = rows_of(table, "edges.png")
    one_less = pc.if_else(pc.equal(rows["instance_index"], 0), pa.scalar(None, pa.string()), rows["mask_rle"])
    mixed = rows.set_column(rows.column_names.index("mask_rle"), "mask_rle", one_less)
    assert (len(to_supervision(mixed)), to_supervision(mixed).mask) == (rows.num_rows, None)


def test_rows_of_two_images_are_refused_by_name(table: Results) -> None:
    pytest.importorskip("supervision")
    with pytest.raises(ValueError, match=r"of one image, these rows of 3: .*/bare\.dib, .*/edges\.png, .*/odd\.webp"):
        to_supervision(table.instances().to_table())


@pytest.mark.parametrize("library", ["supervision", "fiftyone"])
def test_a_library_that_is_missing_is_named(table: Results, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"pip install {library}"):
        to_supervision(rows_of(table, "edges.png")) if library == "supervision" else to_fiftyone(table)


# ----------------------------------------------------------------------------------------------------------- FiftyOne


@pytest.mark.parametrize("size", [*range(1, 60), 93, 640, 4_000])
def test_shares_lead_back_to_the_same_pixels(size: int) -> None:
    """As FiftyOne goes back: by the product cut off, of the begin and of begin plus length."""
    ends = range(size) if size < 100 else np.random.default_rng(size).choice(size, 60, replace=False).tolist()
    for first, end in ((first, last + 1) for first in ends for last in ends if first <= last):
        covered = np.zeros(size, bool)
        covered[[first, end - 1]] = True
        pixels, begin, length = _whole(covered, first, end)
        assert (pixels.start, pixels.stop) == (first, end)
        assert (int(size * begin), int(size * (begin + length))) == (first, end)
        assert begin == pytest.approx(first / size, abs=1e-15)
        assert begin + length == pytest.approx(end / size, abs=1e-15)
        assert begin + length <= 1


@pytest.mark.parametrize(
    ("covered", "start", "stop", "pixels"),
    [
        ([3, 4], 2.9, 5.1, (2, 6)),
        ([3, 4], 3.0, 5.0, (3, 5)),
        ([1, 8], 3.0, 5.0, (1, 9)),
        ([], 3.5, 3.5, (3, 4)),
        ([], 4.0, 4.0, (4, 5)),
        ([], 10.0, 10.0, (9, 10)),
        ([], 0.0, 0.0, (0, 1)),
        ([], 0.0, 10.0, (0, 10)),
    ],
)
def test_whole_pixels_hold_box_and_mask(covered: list[int], start: float, stop: float, pixels: tuple[int, int]) -> None:
    mask = np.zeros(10, bool)
    mask[covered] = True
    assert _whole(mask, start, stop)[0] == slice(*pixels)


@pytest.fixture(scope="module")
def fo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """FiftyOne with a database of its own, which it starts once it is asked for something."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path_factory.mktemp("fiftyone")))
        patch.setenv("FIFTYONE_DATABASE_NAME", "maskline-tests")
        patch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
        patch.setenv("FIFTYONE_SHOW_PROGRESS_BARS", "false")
        fiftyone = pytest.importorskip("fiftyone")
        try:
            fiftyone.list_datasets()
        except (fiftyone.core.config.FiftyOneConfigError, ConnectionError) as error:
            pytest.skip(f"fiftyone has no database: {error}")
        yield fiftyone


def sample_of(fo: Any, dataset: Any, name: str) -> Any:
    return dataset.match(fo.ViewField("filepath").ends_with(f"/{name}")).first()


@pytest.mark.parametrize(("name", "size"), [("edges.png", SIZE), ("odd.webp", ODD)])
def test_fiftyone_renders_the_masks_of_the_table(fo: Any, table: Results, name: str, size: ImageSize) -> None:
    rows = rows_of(table, name).to_pylist()
    found = sample_of(fo, to_fiftyone(table), name).maskline.detections
    assert len(found) == len(rows) > 1
    for one, row in zip(found, rows, strict=True):
        rendered = one.to_segmentation(frame_size=(size.width, size.height)).mask > 0
        assert np.array_equal(rendered, decoded(row))
        assert (one.label, one.confidence) == (row["category"], row["score"])
        x1, y1, x2, y2 = box = [row[side] for side in ("x1", "y1", "x2", "y2")]
        assert (one.instance_index, one.box) == (row["instance_index"], box)
        x, y, w, h = (value * side for value, side in zip(one.bounding_box, (size.width, size.height) * 2, strict=True))
        assert [x, y, w, h] == pytest.approx([round(value) for value in (x, y, w, h)], abs=1e-9)
        assert one.mask.shape == (round(h), round(w))
        assert x - 1e-9 <= x1 <= x2 <= x + w + 1e-9
        assert y - 1e-9 <= y1 <= y2 <= y + h + 1e-9


def test_fiftyone_has_a_sample_for_each_image_that_is_ok(fo: Any, table: Results) -> None:
    dataset = to_fiftyone(table, name="all")
    assert (dataset.name, dataset.media_type, dataset.persistent) == ("all", "image", False)
    paths = [key for key in sorted(table.images().to_table()["image_key"].to_pylist()) if not key.endswith("bad.png")]
    assert dataset.values("filepath") == paths
    assert dataset.values(fo.ViewField("maskline.detections").length()) == [1, 7, 0, 12]
    dataset.reload()
    assert dataset.info == {"maskline": {"output": table.output, "images_left_out": 0}}
    metadata = sample_of(fo, dataset, "edges.png").metadata
    assert (metadata.width, metadata.height, metadata.size_bytes) == (SIZE.width, SIZE.height, 900)
    with pytest.raises(ValueError, match="'all'"):
        to_fiftyone(table, name="all")
    assert len(fo.load_dataset("all")) == len(paths)


def test_instances_without_masks_keep_their_box_in_fiftyone(fo: Any, table: Results) -> None:
    (one,) = sample_of(fo, to_fiftyone(table), "bare.dib").maskline.detections
    assert one.mask is None
    assert one.bounding_box == [3.25 / 64, 4.5 / 48, 56.875 / 64, 39.5 / 48]


def test_conditions_leave_instances_out_and_images_in(fo: Any, table: Results) -> None:
    dataset = to_fiftyone(table, where="category = 'disc' AND score > 0.5")
    wanted = [
        row for row in table.instances().to_table().to_pylist() if row["category"] == "disc" and row["score"] > 0.5
    ]
    assert dataset.count("maskline.detections") == len(wanted) > 0
    assert len(dataset) == 4
    before = fo.list_datasets()
    with pytest.raises(ConfigError, match="the condition was not accepted"):
        to_fiftyone(table, name="refused", where="colour = 3")
    assert fo.list_datasets() == before


def test_what_fiftyone_cannot_open_is_left_out_and_counted(
    fo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "archive", ["gone.png", "here.png"])
    picture = (tmp_path / "archive" / "here.png").read_bytes()
    (tmp_path / "archive" / "a.tar").write_bytes(tar_bytes({"inside.png": picture, "t/deep.png": picture}))
    scores = {"a.tar#inside.png": [0.9], "deep.png": [0.8], "gone.png": [], "here.png": [0.7, 0.6]}
    add_run(str(tmp_path / "out"), "r1", str(tmp_path / "archive"), scores)
    (tmp_path / "archive" / "gone.png").unlink()
    with caplog.at_level(logging.WARNING, "pipeline.interchange"):
        dataset = to_fiftyone(open_results(str(tmp_path / "out")))
    assert dataset.values("filepath") == [f"{tmp_path}/archive/here.png"]
    assert dataset.count("maskline.detections") == 2
    assert dataset.info["maskline"]["images_left_out"] == 3
    assert caplog.messages == ["3 images left out, which are no local files; 1 taken"]
    (tmp_path / "archive" / "here.png").unlink()
    before = fo.list_datasets()
    with pytest.raises(ConfigError, match=r"no image of .* is a local file"):
        to_fiftyone(open_results(str(tmp_path / "out")))
    assert fo.list_datasets() == before

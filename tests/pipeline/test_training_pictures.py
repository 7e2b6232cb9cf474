"""Pictures of a training run: they decode, measure what they should, and show something where something is."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from model.ground_truth import GroundTruth
from model.structures import Detections, ImageSize
from pipeline.scenes import CATEGORIES, draw_scene
from pipeline.training_log import EvaluationRecord, History, StepRecord
from pipeline.training_pictures import _finish, _smoothed, curves, predictions, truth_as_detections

NAMES = dict(enumerate(CATEGORIES, 1))


def history_of(num_steps: int, *, evaluations: int = 0, scale: float = 1.0) -> History:
    history = History()
    for step in range(num_steps):
        loss = scale * (3 * np.exp(-step / 30) + 0.5 + 0.1 * np.sin(step))
        history.add(
            StepRecord(
                step=step,
                epoch=step / 10,
                losses={"class": 0.6 * loss, "mask": 0.4 * loss},
                learning_rate=0.02,
                grad_norm=3 * loss,
                images=2,
                seconds=0.5 + 0.1 * np.cos(step),
                data_seconds=0.01,
                memory_bytes=2**30,
            )
        )
    for index in range(evaluations):
        step = (index + 1) * num_steps // evaluations - 1
        scores = {"segm AP": 0.1 + 0.05 * index, "bbox AP": 0.12 + 0.05 * index}
        history.add(EvaluationRecord(step=step, epoch=step / 10, scores=scores))
    return history


def decoded(png: bytes) -> NDArray[np.uint8]:
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    return np.array(picture.convert("RGB"))


def coloured(pixels: NDArray[np.uint8]) -> int:
    """Pixels that are no shade of grey: those of lines and points."""
    return int((np.ptp(pixels.astype(np.int16), axis=2) > 60).sum())


def panels_of(pixels: NDArray[np.uint8]) -> list[int]:
    """Coloured pixels in each of the three rows and two columns."""
    return [coloured(part) for row in np.array_split(pixels, 3) for part in np.array_split(row, 2, axis=1)]


def scene(seed: int, size: ImageSize) -> tuple[NDArray[np.uint8], Detections]:
    drawn = draw_scene(seed, size)
    boxes = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(drawn.masks.transpose(1, 2, 0), dtype=np.uint8)))
    boxes[:, 2:] += boxes[:, :2]
    truth = GroundTruth(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.from_numpy(drawn.category_ids),
        masks=torch.from_numpy(drawn.masks.astype(np.uint8)),
    )
    return drawn.image, truth_as_detections(size, truth, NAMES)


def test_curves_of_one_run_fill_six_panels() -> None:
    pixels = decoded(curves({"run": history_of(150, evaluations=3)}))
    assert pixels.shape == (1100, 1400, 3)
    assert min(panels_of(pixels)) > 300
    assert (pixels[:5] == 255).all()


def test_curves_without_evaluations_leave_the_panel_of_scores_empty() -> None:
    counts = panels_of(decoded(curves({"run": history_of(50)})))
    assert counts[2] == 0  # scores, the first of the second row
    assert min(counts[:2] + counts[3:]) > 300


def test_curves_of_a_single_step_show_a_point_each() -> None:
    counts = panels_of(decoded(curves({"run": history_of(1, evaluations=1)})))
    assert min(counts) > 20


def test_curves_of_nothing_are_pictures_too() -> None:
    for histories in ({}, {"run": History()}, {"one": History(), "two": History()}):
        pixels = decoded(curves(histories))
        assert pixels.shape[1] == 1400
        assert coloured(pixels) == 0
        assert (pixels < 100).any()


def test_several_runs_have_a_colour_each_and_any_name() -> None:
    names = ["plain", "_hidden", "$x_", "100 %"]
    pixels = decoded(curves({name: history_of(80, evaluations=2, scale=rank + 1) for rank, name in enumerate(names)}))
    assert pixels.shape == (900, 1400, 3)
    for colour in ("1f6fb4", "d9542b", "2f9e5b", "8a5cc2"):
        wanted = np.array([int(colour[index : index + 2], 16) for index in (0, 2, 4)])
        assert (np.abs(pixels.astype(np.int16) - wanted).sum(axis=2) < 10).sum() > 300


def test_losses_that_are_no_numbers_and_long_runs_are_drawn() -> None:
    history = history_of(5000, evaluations=2)
    history.steps[100:200] = [
        replace(record, losses={"class": float("nan"), "mask": float("inf")}) for record in history.steps[100:200]
    ]
    assert min(panels_of(decoded(curves({"run": history})))) > 300
    only_nan = History(steps=[replace(history.steps[0], losses={"class": float("nan")})])
    assert decoded(curves({"run": only_nan})).shape[1] == 1400


@pytest.mark.parametrize(("largest", "scale"), [(19.0, "linear"), (21.0, "log")])
def test_a_loss_that_spans_more_than_twentyfold_is_drawn_on_a_log_scale(largest: float, scale: str) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([1, 2, 3], [1.0, float("nan"), largest])
    _finish(axes, "loss", num_steps=3)
    assert axes.get_yscale() == scale


def test_smoothing_averages_the_neighbours_that_are_numbers() -> None:
    values = np.arange(100.0)  # a window of 2 · int(100 / 40 / 2) + 1 = 3
    assert _smoothed(values)[[0, 50, 99]].tolist() == [0.5, 50, 98.5]
    values[50] = np.nan
    assert _smoothed(values)[[49, 50, 51]].tolist() == [48.5, 50, 51.5]


def test_pairs_stand_side_by_side_in_a_frame() -> None:
    image, truth = scene(0, ImageSize(240, 320))
    nothing = replace(
        truth,
        boxes=truth.boxes[:0],
        scores=truth.scores[:0],
        category_ids=truth.category_ids[:0],
        categories=[],
        masks=[],
        areas=truth.areas[:0],
    )
    pixels = decoded(predictions([image], [truth], [nothing]))
    assert pixels.shape == (26 + 480 + 8 + 2 * 14, 2 * 640 + 3 * 8 + 2 * 14, 3)  # doubled in size
    assert (pixels[14, 14:-14] == (205, 210, 216)).all()
    assert (pixels[:14] == 255).all()
    left, right = pixels[40:520, 22:662], pixels[40:520, 670:1310]
    plain = np.array(Image.fromarray(image).resize((640, 480), Image.Resampling.LANCZOS))
    assert np.array_equal(right, plain)
    assert (left != plain).any(axis=2).mean() > 0.05
    assert (pixels[15:40, 22:662] < 128).any()  # the heading


def test_only_sure_detections_are_drawn_and_not_too_many() -> None:
    image, truth = scene(1, ImageSize(200, 200))
    found = replace(truth, scores=np.linspace(1, 0.1, len(truth)).astype(np.float32))
    sheets = [
        predictions([image], [truth], [found], score_threshold=threshold, max_instances=most)
        for threshold, most in ((0.0, 60), (0.5, 60), (0.5, 1))
    ]
    left = 22 + 648 + 80  # a square in the middle of its cell
    halves = [decoded(sheet)[40:520, left : left + 480] for sheet in sheets]
    plain = np.array(Image.fromarray(image).resize((480, 480), Image.Resampling.LANCZOS))
    drawn = [int((half != plain).any(axis=2).sum()) for half in halves]
    assert drawn[0] > drawn[1] > drawn[2] > 0


def test_eight_images_of_any_shape_are_shown_and_no_more() -> None:
    sizes = [ImageSize(60, 200), ImageSize(200, 60), ImageSize(100, 100), ImageSize(9, 8)] * 3
    scenes = [scene(seed, size) for seed, size in enumerate(sizes)]
    images, truths = [image for image, _ in scenes], [truth for _, truth in scenes]
    eight = predictions(images[:8], truths[:8], truths[:8])
    assert predictions(images, truths, truths) == eight
    assert decoded(eight).shape[1] == 2 * (2 * 480 + 3 * 8 + 14) + 14
    with pytest.raises(ValueError, match="got 2 images, 1 and 2"):
        predictions(images[:2], truths[:1], truths[:2])
    with pytest.raises(ValueError, match="got 0 images"):
        predictions([], [], [])


def test_truth_becomes_detections_whatever_form_its_masks_have() -> None:
    size = ImageSize(20, 30)
    bitmaps = torch.zeros(2, *size, dtype=torch.uint8)
    bitmaps[0, 2:8, 3:13], bitmaps[1, 10:14, 20:25] = 1, 1
    bitmaps_as_rle = coco_mask.encode(np.asfortranarray(bitmaps.numpy().transpose(1, 2, 0)))
    polygons = [
        [np.array([[3.0, 2], [13, 2], [13, 8], [3, 8]])],
        [np.array([[20.0, 10], [25, 10], [25, 14], [20, 14]])],
    ]
    for masks in (bitmaps, list(bitmaps_as_rle), polygons):
        truth = GroundTruth(
            boxes=torch.tensor([[3.0, 2, 13, 8], [20, 10, 25, 14]]), labels=torch.tensor([2, 9]), masks=masks
        )
        detections = truth_as_detections(size, truth, NAMES)
        assert (len(detections), detections.size) == (2, size)
        assert detections.areas.tolist() == [60, 20]
        assert (detections.scores.tolist(), detections.category_ids.tolist()) == ([1, 1], [2, 9])
        assert detections.categories == ["square", "class 9"]
        assert [coco_mask.decode(rle).tolist() for rle in detections.masks] == bitmaps.tolist()


def test_truth_without_masks_or_objects_is_drawn() -> None:
    size = ImageSize(40, 50)
    image = np.full((*size, 3), 120, dtype=np.uint8)
    for count in (0, 1):
        truth = GroundTruth(
            boxes=torch.tensor([[5.0, 5, 30, 30]])[:count],
            labels=torch.ones(count, dtype=torch.int64),
            keypoints=torch.ones(count, 17, 3),
        )
        detections = truth_as_detections(size, truth, NAMES)
        assert (detections.masks, detections.areas.tolist()) == ([], [])
        assert decoded(predictions([image], [detections], [detections])).shape[2] == 3

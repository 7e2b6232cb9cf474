"""Pictures of a training run, PNG: curves of its records, and what a network finds beside what it should find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torch import Tensor

from model.ground_truth import GroundTruth
from model.mask_targets import Masks
from model.structures import Detections, ImageSize, Rle
from pipeline.overlays import draw_overlay
from pipeline.training_log import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# D detections, S steps.

Values = NDArray[np.float64]

_ONE_RUN: list[Any] = [["loss", "parts of the loss"], ["scores", "learning rate"], ["gradient norm", "images/s"]]
_SEVERAL_RUNS: list[Any] = [["loss", "loss"], ["scores", "images/s"]]
"""Titles of the panels."""
_COLOURS = ("#1f6fb4", "#d9542b", "#2f9e5b", "#8a5cc2", "#c98a00", "#c2417f", "#4d8f99", "#7a6a5a")
_LINES = ("-", "--", "-.", ":")
_LOG_SPAN = 20  # largest over least loss, from which the axis is logarithmic
_MOST_POINTS = 2_000  # of a line
_SMOOTHED_SHARE = 1 / 40  # of the steps, averaged into one point of a smooth line
_MOST_SCORES = 6  # lines in one panel

_MOST_IMAGES = 8
_GAP = 14
_MARGIN = 8  # between a frame and what is in it
_HEADING = 26
_FRAME, _INK = (205, 210, 216), (60, 66, 74)


class _Unwritten(float):
    """The score of a ground truth, which a label does not show."""

    def __format__(self, spec: str) -> str:
        return ""


def curves(histories: Mapping[str, History]) -> bytes:
    """1400 px wide, smooth lines over faint raw ones. One run: its loss and parts, scores, learning rate, gradient norm
    and images/s over steps. Several, by name: loss, scores and images/s, one colour each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    is_single = len(histories) == 1
    figure = Figure(figsize=(14, 11 if is_single else 9), dpi=100, facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1))
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic(_ONE_RUN if is_single else _SEVERAL_RUNS)
    for index, (name, history) in enumerate(histories.items()):
        _draw_steps(panels, history, _colour(index), "" if is_single else name)
    _draw_scores(panels["scores"], histories)
    last_steps = [record.step for history in histories.values() for record in history.steps[-1:]]
    for title, axes in panels.items():
        _finish(axes, title, num_steps=max(last_steps, default=0) + 1)
    figure.suptitle(_plain(next(iter(histories))) if is_single else f"{len(histories)} runs", fontsize=15)
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def predictions(
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[Detections],
    found: Sequence[Detections],
    *,
    score_threshold: float = 0.5,
    max_instances: int = 60,
) -> bytes:
    """Pairs of ground truth and predictions over the first eight images, one pair a row or two."""
    if not images or not len(images) == len(truths) == len(found):
        raise ValueError(
            f"each image needs a truth and detections, got {len(images)} images, {len(truths)} and {len(found)}"
        )
    columns = 1 if len(images) <= 2 else 2
    cell = ImageSize(480, 640) if columns == 1 else ImageSize(400, 480)
    pairs = []
    for image, truth, detections in zip(images[:_MOST_IMAGES], truths, found, strict=False):
        sure = _chosen(detections, detections.scores >= score_threshold)
        expected = _drawn(image, truth, [_Unwritten()] * len(truth), cell, max_instances)
        predicted = _drawn(image, sure, sure.scores.tolist(), cell, max_instances)
        heading = f"predictions: {len(sure)} of score {score_threshold:.2f} and above"
        pairs.append({f"ground truth: {len(truth)}": expected, heading: predicted})
    file = BytesIO()
    _sheet(pairs, columns, cell).save(file, "PNG")
    return file.getvalue()


def truth_as_detections(size: ImageSize, truth: GroundTruth, categories: Mapping[int, str]) -> Detections:
    """Ground truth to be drawn as detections are, scores 1. ``size``: of the image; ``categories``: names by label."""
    labels = truth.labels.cpu().numpy().astype(np.int64)
    masks = _run_lengths(truth.masks, size)
    return Detections(
        size=size,
        boxes=truth.boxes.cpu().numpy().astype(np.float32),
        scores=np.ones(len(labels), dtype=np.float32),
        category_ids=labels,
        categories=[categories.get(label, f"class {label}") for label in labels.tolist()],
        masks=masks,
        areas=np.array([coco_mask.area(rle) for rle in masks], dtype=np.int64),
        keypoints=None if truth.keypoints is None else truth.keypoints.cpu().numpy().astype(np.float32),
    )


def _draw_steps(panels: Mapping[Any, Axes], history: History, colour: str, name: str) -> None:
    steps = history.steps
    _draw_line(panels["loss"], history, [record.loss for record in steps], colour, name)
    _draw_line(
        panels["images/s"], history, [record.images / max(record.seconds, 1e-9) for record in steps], colour, name
    )
    if "parts of the loss" not in panels:
        return
    for index, part in enumerate(dict.fromkeys(part for record in steps for part in record.losses)):
        values = [record.losses.get(part, np.nan) for record in steps]
        _draw_line(panels["parts of the loss"], history, values, _colour(index), part)
    _draw_line(panels["gradient norm"], history, [record.grad_norm for record in steps], colour)
    rates = np.array([record.learning_rate for record in steps])
    panels["learning rate"].plot(*_thinned(history, rates), color=colour, marker=_marker(steps))


def _draw_line(axes: Axes, history: History, values: Sequence[float], colour: str, name: str = "") -> None:
    raw = np.array(values, dtype=np.float64)
    raw[~np.isfinite(raw)] = np.nan
    axes.plot(*_thinned(history, raw), color=colour, alpha=0.22, linewidth=0.8)
    smooth = _thinned(history, _smoothed(raw))
    axes.plot(*smooth, color=colour, linewidth=1.8, marker=_marker(values), label=_plain(name))


def _draw_scores(axes: Axes, histories: Mapping[str, History]) -> None:
    """A colour a score of a single run; a colour a run and a dash a score of several."""
    names = _main_scores(histories)
    for index, (run, history) in enumerate(histories.items()):
        for rank, name in enumerate(names):
            records = [record for record in history.evaluations if name in record.scores]
            if records:
                axes.plot(
                    [record.step + 1 for record in records],
                    [record.scores[name] for record in records],
                    color=_colour(rank if len(histories) == 1 else index),
                    linestyle="-" if len(histories) == 1 else _LINES[rank % len(_LINES)],
                    marker="o",
                    markersize=4,
                    label=_plain(f"{run}  {name}" if len(histories) > 1 else name),
                )


def _main_scores(histories: Mapping[str, History]) -> list[str]:
    """All, or those of a plain AP where there are too many to tell apart."""
    every = dict.fromkeys(
        name for history in histories.values() for record in history.evaluations for name in record.scores
    )
    most = _MOST_SCORES if len(histories) == 1 else len(_LINES) // 2
    plain = [name for name in every if name.split()[-1:] == ["AP"]]
    return (list(every) if len(every) <= most else plain or list(every))[:most]


def _finish(axes: Axes, title: str, *, num_steps: int) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_xlim(0, 1.02 * num_steps)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e4e7ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    values = np.concatenate([np.zeros(0), *(np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines)])
    values = values[np.isfinite(values)]
    if not len(values):
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color="#8a9199")
        return
    if title in ("scores", "learning rate", "images/s"):
        axes.set_ylim(bottom=0)
    elif values.max() > _LOG_SPAN * np.min(values[values > 0], initial=np.inf):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(framealpha=0.85, edgecolor="#e4e7ea", fontsize=9)


def _marker(values: Sequence[Any]) -> str:
    """A line of one point is not seen."""
    return "o" if len(values) == 1 else ""


def _smoothed(values: Values) -> Values:
    """(S,) the mean of the neighbours that are numbers."""
    known = np.isfinite(values)
    if not known.any():
        return values
    kernel = np.ones(2 * int(len(values) * _SMOOTHED_SHARE / 2) + 1)
    count = np.convolve(known, kernel, mode="same")
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def _thinned(history: History, values: Values) -> tuple[Values, Values]:
    """Of S steps at most _MOST_POINTS: how many are done, and the values (S,) there."""
    stride = len(values) // _MOST_POINTS + 1
    return np.array([record.step + 1.0 for record in history.steps[::stride]]), values[::stride]


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _plain(text: str) -> str:
    """As matplotlib shall show it: no formula begins at a dollar, and a leading underscore hides nothing."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _drawn(
    image: NDArray[np.uint8], detections: Detections, scores: Sequence[float], cell: ImageSize, max_instances: int
) -> Image.Image:
    """At the size it is shown in, so that labels can be read on images of any size."""
    height, width = image.shape[:2]
    ratio = min(cell.height / height, cell.width / width)
    size = ImageSize(max(1, round(height * ratio)), max(1, round(width * ratio)))
    drawn = draw_overlay(
        np.asarray(Image.fromarray(image).resize((size.width, size.height), Image.Resampling.LANCZOS)),
        boxes=detections.boxes[:max_instances] * np.float32(ratio),
        labels=detections.categories[:max_instances],
        scores=scores[:max_instances],
        masks=[_resized(rle, size) for rle in detections.masks[:max_instances]],
    )
    return Image.fromarray(drawn)


def _chosen(detections: Detections, keep: NDArray[np.bool_]) -> Detections:
    """Those of `keep` (D,)."""
    kept = np.flatnonzero(keep).tolist()
    return replace(
        detections,
        boxes=detections.boxes[kept],
        scores=detections.scores[kept],
        category_ids=detections.category_ids[kept],
        categories=[detections.categories[index] for index in kept],
        masks=[detections.masks[index] for index in kept] if detections.masks else [],
        areas=detections.areas[kept] if len(detections.areas) else detections.areas,
        keypoints=None if detections.keypoints is None else detections.keypoints[kept],
    )


def _resized(rle: Rle, size: ImageSize) -> Rle:
    mask = Image.fromarray(coco_mask.decode(rle)).resize((size.width, size.height), Image.Resampling.NEAREST)
    encoded: Rle = coco_mask.encode(np.asfortranarray(mask))
    return encoded


def _sheet(pairs: Sequence[Mapping[str, Image.Image]], columns: int, cell: ImageSize) -> Image.Image:
    """Each pair, by heading, in a frame; a row as high as its highest picture."""
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heights = [max(picture.height for pair in row for picture in pair.values()) + _HEADING + _MARGIN for row in rows]
    pair_width = 2 * cell.width + 3 * _MARGIN
    sheet = Image.new("RGB", (columns * (pair_width + _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, pair in enumerate(row):
            left = _GAP + column * (pair_width + _GAP)
            draw.rectangle((left, top, left + pair_width - 1, top + height - 1), outline=_FRAME)
            for index, (heading, picture) in enumerate(pair.items()):
                x = left + _MARGIN + index * (cell.width + _MARGIN)
                draw.text((x, top + _HEADING / 2), heading, fill=_INK, font=font, anchor="lm")
                sheet.paste(picture, (x + (cell.width - picture.width) // 2, top + _HEADING))
        top += height + _GAP
    return sheet


def _run_lengths(masks: Masks | None, size: ImageSize) -> list[Rle]:
    if masks is None or len(masks) == 0:
        return []
    if isinstance(masks, Tensor):
        bitmaps = masks.cpu().numpy().astype(np.uint8)  # (D, H, W)
        return list(coco_mask.encode(np.asfortranarray(bitmaps.transpose(1, 2, 0))))
    return [mask if isinstance(mask, dict) else _filled(mask, size) for mask in masks]


def _filled(polygons: Sequence[NDArray[np.floating[Any]]], size: ImageSize) -> Rle:
    parts = [part.reshape(-1).tolist() for part in polygons]
    filled: Rle = coco_mask.merge(coco_mask.frPyObjects(parts, *size))
    return filled

"""Precision over recall as a picture for people: a Score enters, the bytes of a PNG leave."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.coco_evaluation import IOU_THRESHOLDS, RECALLS, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# T IoU thresholds, R recalls, K categories.

MAX_PANELS = 12
"""Categories with a panel of their own: those with the most annotated objects."""

_TITLES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
_CURVES: tuple[tuple[str, float | None, str], ...] = (
    ("0.5", 0.5, "#2a9d8f"),
    ("0.75", 0.75, "#e9a13b"),
    ("mean of 0.5 to 0.95", None, "#264653"),
)


def draw_precision_recall(score: Score) -> bytes:
    """A PNG: the mean over the categories that have ground truth, and small panels of single categories."""
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    present = [index for index, name in enumerate(score.per_category) if score.num_objects[name]]
    names = list(score.per_category)
    largest = sorted(present, key=lambda index: (-score.num_objects[names[index]], names[index]))[:MAX_PANELS]
    panels = largest if len(present) > 1 else []
    columns = math.ceil(math.sqrt(len(panels)))
    rows = max(1, math.ceil(len(panels) / max(1, columns)))
    figure = Figure(figsize=(6 + 2 * columns, max(5.0, 2.2 * rows)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(rows, 3 + columns)
    main = figure.add_subplot(grid[:, :3])
    _draw_curves(main, _mean_over(score.precision, present))
    noun = "category" if len(present) == 1 else "categories"
    main.set_title(f"{_TITLES[score.kind]}: {len(present)} {noun}, AP {_percent(score.stats['AP'])}")
    main.set(xlabel="recall", ylabel="precision")
    main.legend(title="OKS" if score.kind == "keypoints" else "IoU", loc="lower left", frameon=False)
    for place, index in enumerate(panels):
        panel = figure.add_subplot(grid[place // columns, 3 + place % columns])
        _draw_curves(panel, score.precision[:, :, index])
        title = f"{names[index]}, AP {_percent(score.per_category[names[index]])}"
        panel.set_title(title, fontsize=8, parse_math=False)  # a name may hold a dollar
        panel.tick_params(labelsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _mean_over(precision: NDArray[np.float64], categories: list[int]) -> NDArray[np.float64]:
    """(T, R) of (T, R, K); nan where there is no category."""
    if not categories:
        return np.full(precision.shape[:2], np.nan)
    mean: NDArray[np.float64] = precision[:, :, categories].mean(axis=2)
    return mean


def _draw_curves(axes: Axes, precision: NDArray[np.float64]) -> None:
    """`precision` (T, R)."""
    for label, threshold, colour in _CURVES:
        curve = precision.mean(axis=0) if threshold is None else precision[np.isclose(IOU_THRESHOLDS, threshold)][0]
        axes.plot(RECALLS, curve, color=colour, label=label, linewidth=1.5)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def _percent(value: float) -> str:
    return "—" if np.isnan(value) else f"{100 * value:.1f} %"

"""What ``maskline benchmark`` says of its model part: ratios, tables and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.table import Table

from jobs.model_benchmark import ModelRow
from jobs.model_systems import DETECTRON2, REFERENCE, UNTUNED
from model.stages import STAGES

OURS = "maskline"


def model_ratios(rows: Sequence[ModelRow]) -> dict[str, float]:
    """Of our fastest form with a hundred detections, over torchvision in float32, over its best form, over both as
    their users have them, and over detectron2 with detectron2's weights."""
    ratios: dict[str, float] = {}
    rates = {(row.reference, row.setting, row.system): row.images_per_second for row in rows}
    first = {key[2]: rate for key, rate in rates.items() if key[:2] == (REFERENCE, "many")}
    if first:
        ours = {system: rate for system, rate in first.items() if system.startswith(OURS)}
        untuned = {system: rate for system, rate in first.items() if system.endswith(UNTUNED)}
        theirs = {system: rate for system, rate in first.items() if system not in ours and system not in untuned}
        ratios["model_vs_torchvision"] = max(ours.values()) / theirs[REFERENCE]
        ratios["model_vs_best_torchvision"] = max(ours.values()) / max(theirs.values())
        ratios["model_fp32_vs_torchvision"] = ours["maskline, float32"] / theirs[REFERENCE]
        if untuned:
            ratios["model_vs_untuned_torchvision"] = max(ours.values()) / untuned[REFERENCE + UNTUNED]
            ratios["model_vs_best_untuned_torchvision"] = max(ours.values()) / max(untuned.values())
            ratios["model_fp32_vs_untuned_torchvision"] = ours["maskline, float32"] / untuned[REFERENCE + UNTUNED]
    second = {key[2]: rate for key, rate in rates.items() if key[0] == DETECTRON2}
    if second:
        ratios["model_vs_detectron2"] = max(second.values()) / second[DETECTRON2]
        ratios["model_fp32_vs_detectron2"] = second["maskline, float32"] / second[DETECTRON2]
    return ratios


def model_table(rows: Sequence[ModelRow]) -> Table:
    """Speeds, and how far the answers are from the reference's."""
    names = ("setting", "system", "detections", "images/s", "ratio", "TFLOP/s", "of product", "GB", "syncs")
    agreeing = ("matched", "box", "score", "mask")
    table = Table(
        *names,
        *agreeing,
        caption="of product: of what one large matrix product achieves. syncs: waits of the host in a batch. Beside the"
        " setting's first system: detections matched, and what 99 of 100 of them keep: pixels of the box, score, IoU of"
        " the mask.",
    )
    rates = {row.setting: row.images_per_second for row in rows if row.system == row.reference}
    for row in rows:
        table.add_row(
            row.setting,
            row.system,
            f"{row.detections:.0f}",
            f"{row.images_per_second:.3g}",
            f"{row.images_per_second / rates[row.setting]:.2f}",
            f"{row.tflops:.3g}",
            f"{row.of_product:.0%}",
            f"{row.peak_bytes / 1e9:.1f}",
            "" if row.syncs is None else f"{row.syncs:.0f}",
            f"{row.agreement.matched:.1%}",
            f"{row.agreement.box:.2f}",
            f"{row.agreement.score:.4f}",
            f"{row.agreement.mask_iou:.3f}",
        )
    return table


def stage_table(rows: Sequence[ModelRow]) -> Table:
    """Milliseconds of an image by stage, of the setting with most detections."""
    shown = [row for row in rows if row.setting == rows[0].setting]
    table = Table("milliseconds of an image", *(row.system for row in shown))
    for stage in STAGES:
        table.add_row(stage, *(f"{row.stage_milliseconds[stage]:.1f}" for row in shown))
    table.add_row("all", *(f"{sum(row.stage_milliseconds.values()):.1f}" for row in shown))
    return table


def speed_picture(rows: Sequence[ModelRow], caption: str) -> bytes:
    """A PNG with a bar for each system, by setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    settings = list(dict.fromkeys(row.setting for row in rows))
    figure = Figure(figsize=(8, 0.6 + 0.42 * len(rows) + 0.4 * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [sum(row.setting == setting for row in rows) for setting in settings]
    panels = figure.subplots(len(settings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, setting in zip(panels, settings, strict=True):
        shown = [row for row in rows if row.setting == setting]
        reference = next(row.images_per_second for row in shown if row.system == row.reference)
        colours = ["tab:blue" if row.system.startswith(OURS) else "tab:grey" for row in shown]
        bars = axes.barh([row.system for row in shown], [row.images_per_second for row in shown], color=colours)
        ratios = [row.images_per_second / reference for row in shown]
        labels = [f" {row.images_per_second:.3g}  ({ratio:.1f}×)" for row, ratio in zip(shown, ratios, strict=True)]
        axes.bar_label(bars, labels)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(f"{setting}: {shown[0].detections:.0f} detections an image", loc="left", fontsize=10)
    panels[-1].set_xlabel(f"images/s, pixels in memory to run lengths. {caption}", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()

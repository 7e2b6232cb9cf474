"""The precision part of ``maskline benchmark``: what bf16 changes in the answers of trained weights.

A network with random weights decides by next to nothing; what a trained one finds on annotated images says whether the
faster precision may be used.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

import model
from jobs.agreement import share_kept
from model import Detections
from model.network import Precision
from pipeline.coco import CocoDataset, find_missing_files, read_coco
from pipeline.image_cache import ImageCache
from pipeline.training_evaluation import Evaluator
from pipeline.worker_group import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """One network in one precision on all images."""

    weights: str
    precision: Precision
    images: int
    detections: int
    seconds: float
    """Of `predict` alone."""
    box_ap: float
    mask_ap: float
    kept: float
    """Share of float32's sure detections that are found alike, as `agreement.share_kept` has it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_precision(weights: str, annotations: str, images: str, device: torch.device) -> list[PrecisionRow]:
    """float32 and bf16 on the images of a COCO file, scored by pycocotools."""
    dataset = find_missing_files(read_coco(annotations, wanted=frozenset({"masks"})), images)
    reference: list[Detections] = []
    rows = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        net = model.load(weights, device=device, precision=precision)
        found, seconds, scores = _scored(net, dataset, images)
        reference = reference or found
        rows.append(
            PrecisionRow(
                weights=net.name,
                precision=precision,
                images=len(found),
                detections=sum(map(len, found)),
                seconds=seconds,
                box_ap=scores["bbox AP"],
                mask_ap=scores["segm AP"],
                kept=share_kept(found, reference),
            )
        )
    return rows


def _scored(net: model.MaskRCNN, dataset: CocoDataset, images: str) -> tuple[list[Detections], float, dict[str, float]]:
    """What is found in each image, the seconds that took, and its scores by name."""
    found: list[Detections] = []
    seconds = 0.0

    def predict(pixels: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        nonlocal seconds
        began = time.perf_counter()
        of_images = net.predict(pixels)
        seconds += time.perf_counter() - began
        found.extend(of_images)
        return of_images

    with tempfile.TemporaryDirectory() as cache:
        scores = Evaluator(
            dataset,
            images,
            categories=net.categories,
            kinds=("bbox", "segm"),
            group=WorkerGroup(),
            cache=ImageCache(cache, max_bytes=10**9),
        ).scores(predict)
    return found, seconds, scores


def precision_ratios(rows: Sequence[PrecisionRow]) -> dict[str, float]:
    """What bf16 adds to AP, in points of a hundred, and what it keeps."""
    if not rows:
        return {}
    full, half = rows
    return {
        "bf16_box_ap_points": 100 * (half.box_ap - full.box_ap),
        "bf16_mask_ap_points": 100 * (half.mask_ap - full.mask_ap),
        "bf16_kept": half.kept,
    }


def precision_table(rows: Sequence[PrecisionRow]) -> Table:
    """For people."""
    table = Table("weights", "precision", "images", "detections", "images/s", "box AP", "mask AP", "kept")
    for row in rows:
        table.add_row(
            row.weights,
            row.precision,
            str(row.images),
            str(row.detections),
            f"{row.images / row.seconds:.3g}",
            f"{row.box_ap:.4f}",
            f"{row.mask_ap:.4f}",
            f"{row.kept:.2%}",
        )
    return table

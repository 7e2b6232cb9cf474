"""The model part of ``maskline benchmark``: pixels in memory to run lengths, ours against torchvision's own network.

Same images, same weights, same number of detections. Each system does all that a user needs: resize, normalise,
forward, paste, threshold and run lengths. How far its answer is from torchvision's in float32 stands beside its speed.
"""

# N images of a batch, D detections of an image.

from __future__ import annotations

import io
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import nn

import model
from jobs.agreement import Agreement, agreement
from jobs.torchvision_peer import compiled, predict_batches, torchvision_network
from model import Detections, ImageSize, MaskRCNN, gmacs, random_weights
from model.network import Precision

Pixels = NDArray[np.uint8]
Batches = list[list[Pixels]]
Predict = Callable[[Batches], list[Detections]]

TorchvisionForm = Literal["eager", "bf16", "compiled"]

REFERENCE = "torchvision, float32"
FILLED = 2.5
"""Deviations that mask logits are raised by: all but some in a hundred of a mask's cells are then set."""
MEASURED_SECONDS = 1.0
"""A pass of a GPU over a few batches is too short to be measured alone."""
FEW_DETECTIONS = 10
"""Of an image, in the second setting."""


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One system in one setting."""

    system: str
    setting: str
    """Whether many or few detections are kept."""
    detections: float
    """Mean of an image."""
    images_per_second: float
    seconds: tuple[float, ...]
    """Of each repeat over all images."""
    agreement: Agreement
    peak_bytes: int
    """Of device memory; 0 on a CPU."""
    syncs: float | None
    """Times a batch that the host waited for the device, but for events; None where that cannot be counted."""
    tflops: float
    """Achieved, counting what the network of 1,000 proposals and so many detections must compute."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark:
    """What is measured, and on what."""

    paths: Sequence[Path]
    device: torch.device
    batch_size: int
    repeats: int
    forms: Sequence[TorchvisionForm]
    """Of torchvision's network; eager is always measured."""
    min_size: int = 800
    max_size: int = 1333


def measure_model(setting: ModelBenchmark, read: Callable[[Path], Pixels]) -> list[ModelRow]:
    """Rows of each system, with a hundred detections an image and with about ten."""
    images = [read(path) for path in setting.paths]
    theirs: Any = torchvision_network("v1", images[0], min_size=setting.min_size, max_size=setting.max_size)
    _fill_masks(theirs)
    nets = _ours(theirs, setting)
    net = next(iter(nets.values()))
    batches = _batches(images, net, setting.batch_size)
    work = {name: _work_per_image(net, batches, count) for name, count in (("many", 100), ("few", 10))}
    theirs.to(setting.device)
    rows: list[ModelRow] = []
    threshold = theirs.roi_heads.score_thresh
    for name in ("many", "few"):
        theirs.roi_heads.score_thresh = threshold
        systems: dict[str, Predict] = {REFERENCE: predict_batches(theirs, setting.device)}
        if "bf16" in setting.forms:
            systems["torchvision, autocast bf16"] = predict_batches(theirs, setting.device, autocast=True)
        if "compiled" in setting.forms:
            systems["torchvision, compiled"] = predict_batches(compiled(theirs), setting.device)
        systems |= {system: _of_net(net, threshold) for system, net in nets.items()}
        rows += _measure(systems, batches, setting, name, work[name])
        if name == "many":
            threshold = _threshold_of_few(systems[REFERENCE](batches[:1]), setting.batch_size)
    return rows


def _fill_masks(theirs: Any) -> None:
    """Random logits make a mask of specks, with thousands of runs; raised, they make one piece with a few holes."""
    theirs.roi_heads.mask_predictor.mask_fcn_logits.bias.data.add_(FILLED * random_weights.MASK_LOGITS_STD)


def _measure(
    systems: dict[str, Predict], batches: Batches, setting: ModelBenchmark, name_of_setting: str, work: float
) -> list[ModelRow]:
    found: dict[str, list[Detections]] = {}
    peaks: dict[str, int] = {}
    syncs: dict[str, float | None] = {}
    for name, predict in systems.items():  # the first passes are the slowest, and are not counted
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[name] = predict(batches)
        peaks[name] = torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else 0
        syncs[name] = None
        if setting.device.type == "cuda":
            if name.startswith("maskline"):
                predict(batches)  # a shape that came once is captured now
            syncs[name] = _syncs(predict, batches[:1])
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(setting.repeats):
        for name, predict in systems.items():
            seconds[name].append(_seconds(predict, batches))
    reference = found[REFERENCE]
    count = sum(map(len, batches))
    return [
        ModelRow(
            system=name,
            setting=name_of_setting,
            detections=statistics.mean(len(one) for one in found[name]),
            images_per_second=count / statistics.median(times),
            seconds=tuple(times),
            agreement=agreement(found[name], reference),
            peak_bytes=peaks[name],
            syncs=syncs[name],
            tflops=work * count / statistics.median(times) / 1e12,
        )
        for name, times in seconds.items()
    ]


def _seconds(predict: Predict, batches: Batches) -> float:
    """Of one pass over all images, the mean of as many as begin within MEASURED_SECONDS."""
    began, passes = time.perf_counter(), 0
    while passes == 0 or time.perf_counter() - began < MEASURED_SECONDS:
        predict(batches)
        passes += 1
    return (time.perf_counter() - began) / passes


def _ours(theirs: nn.Module, setting: ModelBenchmark) -> dict[str, MaskRCNN]:
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    loaded = model.load(file.getvalue())
    config = replace(loaded.config, min_size=setting.min_size, max_size=setting.max_size)
    precisions: dict[str, Precision] = {"maskline, float32": "fp32", "maskline, bf16": "bf16"}
    nets = {
        name: MaskRCNN(
            loaded.network,
            config=config,
            recipe=loaded.recipe,
            categories=loaded.categories,
            name=loaded.name,
            sha256=loaded.sha256,
            device=setting.device,
            precision=precision,
        )
        for name, precision in precisions.items()
    }
    for net in nets.values():
        net.batch_size = setting.batch_size
    return nets


def _of_net(net: MaskRCNN, threshold: float) -> Predict:
    def predict(batches: Batches) -> list[Detections]:
        return net.predict([image for batch in batches for image in batch], threshold)

    return predict


def _work_per_image(net: MaskRCNN, batches: Batches, num_detections: int) -> float:
    """Floating point operations of an image, the mean over the batches."""
    sizes = [net.padded_size(ImageSize(*batch[0].shape[:2])) for batch in batches]
    counts = {
        size: gmacs.count(
            net.config, net.recipe, size, num_proposals=net.recipe.rpn_post_nms, num_detections=num_detections
        )
        for size in set(sizes)
    }
    return 2 * statistics.mean(sum(counts[size].values()) for size in sizes)


def _batches(images: Sequence[Pixels], net: MaskRCNN, batch_size: int) -> Batches:
    """Full batches of images that share their padded size; the last of a size is filled with its first images."""
    groups: dict[ImageSize, list[Pixels]] = {}
    for image in images:
        groups.setdefault(net.padded_size(ImageSize(*image.shape[:2])), []).append(image)
    return [
        [group[index % len(group)] for index in range(start, start + batch_size)]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def _threshold_of_few(found: Sequence[Detections], num_images: int) -> float:
    """The score that about FEW_DETECTIONS of an image are above."""
    scores = np.sort(np.concatenate([one.scores for one in found]))
    return float(scores[-min(len(scores), FEW_DETECTIONS * num_images)])


def _syncs(predict: Predict, batches: Batches) -> float:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        predict(batches)
        torch.cuda.set_sync_debug_mode("default")
    return float(sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught))


def model_ratios(rows: Sequence[ModelRow]) -> dict[str, float]:
    """Of our fastest form in the first setting, over torchvision in float32 and over its best form."""
    first = [row for row in rows if row.setting == rows[0].setting]
    theirs = {row.system: row.images_per_second for row in first if row.system.startswith("torchvision")}
    ours = {row.system: row.images_per_second for row in first if row.system.startswith("maskline")}
    if not theirs or not ours:
        return {}
    return {
        "model_vs_torchvision": max(ours.values()) / theirs[REFERENCE],
        "model_vs_best_torchvision": max(ours.values()) / max(theirs.values()),
        "model_fp32_vs_torchvision": ours["maskline, float32"] / theirs[REFERENCE],
    }


def model_table(rows: Sequence[ModelRow]) -> Table:
    """For people."""
    names = ("system", "detections", "images/s", "ratio", "TFLOP/s", "GB", "syncs", "matched", "box", "score", "mask")
    table = Table(
        *names,
        caption="syncs: waits of the host in a batch. Beside torchvision in float32: detections matched, and what 99 of"
        " 100 of them keep: pixels of the box, score, IoU of the mask.",
    )
    rates = {row.setting: row.images_per_second for row in rows if row.system == REFERENCE}
    for row in rows:
        table.add_row(
            row.system,
            f"{row.detections:.0f}",
            f"{row.images_per_second:.2f}",
            f"{row.images_per_second / rates[row.setting]:.2f}",
            f"{row.tflops:.1f}",
            f"{row.peak_bytes / 1e9:.1f}",
            "" if row.syncs is None else f"{row.syncs:.0f}",
            f"{row.agreement.matched:.1%}",
            f"{row.agreement.box:.2f}",
            f"{row.agreement.score:.4f}",
            f"{row.agreement.mask_iou:.3f}",
        )
    return table

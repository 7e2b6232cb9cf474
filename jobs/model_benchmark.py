"""The model part of ``maskline benchmark``: pixels in memory to run lengths, ours against its peers.

Same images, same weights, same number of detections. Each system does all that a user needs: resize, normalise,
forward, paste, threshold and run lengths. How far its answer is from its reference in float32 stands beside its speed.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.agreement import Agreement, agreement
from jobs.model_systems import (
    UNTUNED,
    Batches,
    ModelBenchmark,
    Pixels,
    Predict,
    Setting,
    System,
    with_detectron2,
    with_torchvision,
)
from jobs.stage_times import StageClock
from model import Detections
from model.stages import Stage

MEASURED_SECONDS = 1.0
"""A pass of a GPU over a few batches is too short to be measured alone."""
PRODUCT_SIDE = {"cuda": 8192, "cpu": 2048}
"""Of the square matrices whose product shows what the device does at best."""


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One system in one setting."""

    system: str
    setting: str
    """Whether many or few detections are kept, and of whose weights."""
    reference: str
    detections: float
    """Mean of an image."""
    images_per_second: float
    seconds: tuple[float, ...]
    """Of each repeat over all images."""
    agreement: Agreement
    peak_bytes: int
    """Of device memory; on a CPU of the whole process, all systems in it, and 0 where the system does not tell."""
    syncs: float | None
    """Times a batch that the host waited for the device, but for events; None where that cannot be counted."""
    tflops: float
    """Achieved, counting what the network of 1,000 proposals and so many detections must compute."""
    of_product: float
    """The same as a share of what one large matrix product achieves here in the system's precision."""
    stage_milliseconds: dict[Stage, float]
    """Of an image, each stage waited for; on a GPU without the graphs that the speed is measured with."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_model(benchmark: ModelBenchmark, read: Callable[[Path], Pixels]) -> list[ModelRow]:
    """Rows of each system: torchvision's weights with a hundred detections an image and with about ten, detectron2's
    with a hundred."""
    images = [read(path) for path in benchmark.paths]
    rows = [row for setting in with_torchvision(images, benchmark) for row in _measure(setting, benchmark)]
    if "detectron2" in benchmark.peers:
        rows += _measure(with_detectron2(images, benchmark), benchmark)
    return rows


def measure_untuned(benchmark: ModelBenchmark, read: Callable[[Path], Pixels]) -> list[ModelRow]:
    """Rows of torchvision's forms alone, for a process that nothing of ours is set in."""
    images = [read(path) for path in benchmark.paths]
    rows: list[ModelRow] = []
    for setting in with_torchvision(images, benchmark):
        theirs = {name: system for name, system in setting.systems.items() if not name.startswith("maskline")}
        rows += _measure(replace(setting, systems=theirs), benchmark)
    return [replace(row, system=row.system + UNTUNED) for row in rows]


def _measure(setting: Setting, benchmark: ModelBenchmark) -> list[ModelRow]:
    found: dict[str, list[Detections]] = {}
    peaks: dict[str, int] = {}
    syncs: dict[str, float | None] = {}
    is_cuda, batches = benchmark.device.type == "cuda", setting.batches
    for name, system in setting.systems.items():  # the first passes are the slowest, and are not counted
        _forget_peak(benchmark.device)
        found[name] = system.predict(batches)
        peaks[name] = _peak_bytes(benchmark.device)
        if is_cuda and name.startswith("maskline"):
            system.predict(batches)  # a shape that came once is captured now
        syncs[name] = _syncs(system.predict, batches[:1]) if is_cuda else None
    seconds: dict[str, list[float]] = {name: [] for name in setting.systems}
    for _ in range(benchmark.repeats):
        for name, system in setting.systems.items():
            seconds[name].append(_seconds(system.predict, batches))
    count = sum(map(len, batches))
    products = {system.dtype: product_tflops(benchmark.device, system.dtype) for system in setting.systems.values()}
    rows = []
    for name, system in setting.systems.items():
        rate = count / statistics.median(seconds[name])
        rows.append(
            ModelRow(
                system=name,
                setting=setting.name,
                reference=setting.reference,
                detections=statistics.mean(len(one) for one in found[name]),
                images_per_second=rate,
                seconds=tuple(seconds[name]),
                agreement=agreement(found[name], found[setting.reference]),
                peak_bytes=peaks[name],
                syncs=syncs[name],
                tflops=setting.work * rate / 1e12,
                of_product=setting.work * rate / 1e12 / products[system.dtype],
                stage_milliseconds=_stage_milliseconds(system, batches, benchmark.device),
            )
        )
    return rows


def _stage_milliseconds(system: System, batches: Batches, device: torch.device) -> dict[Stage, float]:
    """Of an image, over all batches."""
    clock = StageClock(device)
    with system.telling(clock.after):
        for batch in batches:
            clock.start()
            system.predict([batch])
            clock.after("paste and run lengths")
    count = sum(map(len, batches))
    return {stage: seconds / count * 1e3 for stage, seconds in clock.seconds.items()}


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of some products of large square matrices, as the libraries that convolutions use compute them."""
    side = PRODUCT_SIDE[device.type]
    matrix = torch.randn(side, side, device=device).to(dtype)
    best, before = math.inf, torch.get_float32_matmul_precision()
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")  # as its convolutions have it
    for _ in range(8):
        began = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    torch.set_float32_matmul_precision(before)
    return 2 * side**3 / best / 1e12


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _seconds(predict: Predict, batches: Batches) -> float:
    """Of one pass over all images, the mean of as many as begin within MEASURED_SECONDS."""
    began, passes = time.perf_counter(), 0
    while passes == 0 or time.perf_counter() - began < MEASURED_SECONDS:
        predict(batches)
        passes += 1
    return (time.perf_counter() - began) / passes


def _syncs(predict: Predict, batches: Batches) -> float:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        predict(batches)
        torch.cuda.set_sync_debug_mode("default")
    return float(sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught))

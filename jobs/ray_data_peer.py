"""The peer of ``maskline benchmark``: what one writes with Ray Data for the same work."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torchvision


def run(folder: str, output: Path, *, best: bool) -> float:
    """Seconds to list, read, decode and pass through a no-op, and to write a row for each image to Parquet.

    Args:
        best: ``read_binary_files`` and torchvision's decoder in ``map_batches``; else ``read_images``.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    started = time.perf_counter()
    if best:
        images = ray.data.read_binary_files(folder, include_paths=True)
        found = images.map_batches(_decode_then_find_nothing, batch_size=64)
    else:
        images = ray.data.read_images(folder, mode="RGB", include_paths=True)
        found = images.map_batches(_find_nothing, batch_size=64)
    found.write_parquet(str(output))
    return time.perf_counter() - started


def _find_nothing(batch: dict[str, Any]) -> dict[str, Any]:
    return {"path": batch["path"], "num_instances": np.zeros(len(batch["image"]), np.int32)}


def _decode_then_find_nothing(batch: dict[str, Any]) -> dict[str, Any]:
    images = [
        torchvision.io.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=torchvision.io.ImageReadMode.RGB
        )
        for data in batch["bytes"]
    ]
    return {"path": batch["path"], "num_instances": np.zeros(len(images), np.int32)}


def warm_up(folder: Path, output: Path) -> None:
    """Run both forms over a few images, so that the start of Ray Data's workers is in no figure."""
    few = output / "few"
    few.mkdir()
    for path in itertools.islice(folder.iterdir(), 8):
        os.link(path, few / path.name)
    for best in (False, True):
        run(str(few), output / f"warm-{best}", best=best)

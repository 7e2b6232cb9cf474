"""The peer of ``maskline benchmark``'s end to end part: the model alone, over images that are in memory already."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

import model
from jobs.network_weights import load_weights
from model.structures import sizes_of
from pipeline import cluster, decode
from pipeline.batching import DecodedImage, batches
from pipeline.segmenter import Pixels, Segmenter


class ModelLoop:
    """The bare loop: images decoded and grouped beforehand, then nothing but ``predict``."""

    def __init__(
        self, weights: bytes, device: cluster.Device, precision: Literal["fp32", "bf16"], threads: int, paths: list[str]
    ) -> None:
        torch.set_num_threads(threads)
        self.net = model.load(weights, device=device, precision=precision)
        with ThreadPoolExecutor(threads) as pool:
            decoded = list(pool.map(read_pixels, map(Path, paths)))
        images = [
            DecodedImage(index=index, pixels=pixels, size=size, orientation=1, num_bytes=0)
            for index, (pixels, size) in enumerate(zip(decoded, sizes_of(decoded), strict=True))
        ]
        grouped = batches(
            images,
            batch_size=self.net.batch_size,
            shape_of=lambda image: self.net.padded_size(image.size),
            max_waiting_bytes=2**40,
        )
        self.pixels = [image.pixels for batch in grouped for image in batch]
        _warm_up(self.net, self.pixels[0], device)

    def run(self) -> float:
        """Seconds for all images."""
        started = time.perf_counter()
        self.net.predict(self.pixels, score_threshold=0.5)
        return time.perf_counter() - started


def load_warm(weights: bytes, image: str, device: cluster.Device, precision: Literal["fp32", "bf16"]) -> Segmenter:
    """In an actor: the model, its first and slowest runs behind it, as in the bare loop."""
    segmenter = load_weights(weights, "benchmark", device, precision)
    _warm_up(segmenter, read_pixels(Path(image)), device)
    return segmenter


def _warm_up(segmenter: Segmenter, pixels: Pixels, device: cluster.Device) -> None:
    """Its first run is the slowest; a GPU captures its graph in the second."""
    images = [pixels] * segmenter.batch_size
    for _ in range(3 if device == "cuda" else 1):
        segmenter.encode(segmenter.detect(images, 0.5, sizes=sizes_of(images)), 0.5)


def read_pixels(path: Path) -> Pixels:
    """One image file, decoded: uint8 RGB (H, W, 3)."""
    data = path.read_bytes()
    return decode.decode(data, decode.inspect(data, decode.DecodeLimits()))

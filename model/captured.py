"""The whole forward as CUDA graphs: one for each batch size and padded input, replayed without the host in between.

uint8 images enter; boxes, scores, labels and encoded masks leave in pinned memory, once `Pending.done` has happened.
The host starts a batch and is free to start the next: it waits for nothing but the results it wants to read.
"""

# N images of a batch, B bytes of their pixels.

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.fixed_forward import FixedInputs, FixedOutputs, detect_fixed
from model.network import Network
from model.raw_detections import MaskTexts, Pending, RawDetections
from model.recipe import Recipe
from model.stages import AfterStage, nothing
from model.structures import ImageSize, sizes_of
from model.transfers import to_device, to_host

MAX_GRAPHS = 64
"""Kept, those used last; each holds its input, and all share the memory they work in."""

STAGED_BYTES = 2**24
"""Of a batch's pixels, at first; buffers grow to what batches need."""

WARM_UPS = 2
"""Runs before a capture: libraries choose their kernels in the first."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Sizes that are captured; a batch is filled up with empty images to the next."""


_CAPTURING = threading.Lock()
"""Of the process: two captures at once would take up each other's work."""


def can_capture(network: Network, config: ModelConfig, recipe: Recipe) -> bool:
    """Whether the network is of the kind whose every step has fixed shapes, and runs where it can be captured."""
    return (
        network.body.fused
        and (config.neck, config.pooling, config.proposals) == ("fpn", "align", "rpn")
        and config.num_keypoints == 0
        and recipe.resize == "torchvision"
    )


class _HostInputs(NamedTuple):
    """What comes from the host for one batch."""

    num_places: int
    """N."""
    padded: ImageSize
    pixels: Tensor
    """(B,) uint8, images end to end."""
    offsets: Tensor
    """(N,) where each begins."""
    given_sizes: Tensor
    """(N, 2) float32 of the pixels."""
    image_sizes: Tensor
    """(N, 2) float32."""
    resized_sizes: Tensor
    """(N, 2) float32."""
    score_threshold: Tensor
    """() float32."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: FixedInputs
    outputs: FixedOutputs


class CapturedDetector:
    """One network's graphs, for one batch at a time."""

    def __init__(self, network: Network, cells: Sequence[Tensor], *, config: ModelConfig, recipe: Recipe) -> None:
        from model.kernels.input_pixels import Staging

        self.recipe = recipe
        self._forward = partial(detect_fixed, network, cells=cells, config=config, recipe=recipe)
        self.device = cells[0].device
        self._dtype = network.body.stem.conv.weight.dtype
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._staging = [Staging(STAGED_BYTES, self.device), Staging(STAGED_BYTES, self.device)]
        self._pool: Any = None
        self._graphs: OrderedDict[tuple[int, ImageSize], _Graph] = OrderedDict()
        self._seen: set[tuple[int, ImageSize]] = set()
        self._lock = threading.Lock()

    def detect(
        self,
        images: Sequence[NDArray[np.uint8]],
        sizes: list[ImageSize],
        resized: Sequence[ImageSize],
        padded: ImageSize,
        score_threshold: float,
        after: AfterStage = nothing,
    ) -> RawDetections:
        """Start a batch of images of one padded size, of which the pixels may be smaller versions; no graph is replayed
        for who wants its stages."""
        with self._lock, torch.cuda.stream(self._stream):
            sent = self._sent(images, sizes, resized, padded, score_threshold)
            found = _to_host(self._run(sent) if after is nothing else self._run_once(sent, after))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return RawDetections(
            sizes=sizes,
            boxes=found.boxes,
            scores=found.scores,
            labels=found.labels,
            valid=found.valid,
            mask_logits=None,
            mask_texts=found.mask_texts,
            pending=Pending(done=done, uncertain=found.uncertain, images=images, score_threshold=score_threshold),
        )

    def _sent(
        self,
        images: Sequence[NDArray[np.uint8]],
        sizes: Sequence[ImageSize],
        resized: Sequence[ImageSize],
        padded: ImageSize,
        score_threshold: float,
    ) -> _HostInputs:
        """On their way to the device while it works on the batch before; filled up with images of one pixel."""
        num_places = next((size for size in BATCH_SIZES if size >= len(images)), len(images))
        num_empty = num_places - len(images)
        empty = [ImageSize(1, 1)] * num_empty
        self._staging.reverse()
        with torch.cuda.stream(self._copies):
            pixels, offsets = self._staging[0].send([*images, *[np.zeros((1, 1, 3), np.uint8)] * num_empty])
            sent = _HostInputs(
                num_places,
                padded,
                pixels,
                offsets,
                _on_device([*sizes_of(images), *empty], self.device),
                _on_device([*sizes, *empty], self.device),
                _on_device([*resized, *empty], self.device),
                _on_device(score_threshold, self.device),
            )
        self._stream.wait_stream(self._copies)
        for values in sent[2:]:
            values.record_stream(self._stream)
        return sent

    def _run(self, inputs: _HostInputs) -> FixedOutputs:
        """What the device will find, on the stream; captured where the shape has been seen before."""
        key = inputs.num_places, inputs.padded
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif key in self._seen:
            self._graphs[key] = self._captured(*key)
        else:  # a capture costs more than some runs, and many shapes come once
            self._seen.add(key)
            return self._run_once(inputs, nothing)
        graph = self._graphs[key]
        self._fill(graph.inputs, inputs)
        graph.graph.replay()
        return graph.outputs

    def _run_once(self, host: _HostInputs, after: AfterStage) -> FixedOutputs:
        inputs = self._new_inputs(host.num_places, host.padded)
        self._fill(inputs, host)
        after("resize and normalise")
        with fastest_kernels():
            return self._forward(inputs, after=after)

    def _captured(self, num_places: int, padded: ImageSize) -> _Graph:
        """A graph for this shape, in place of others where there is no room."""
        while len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            return self._capture(num_places, padded)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        # Not while the error is handled, whose frames hold what was allocated.
        self._stream.synchronize()
        self._graphs.clear()
        self._pool = None
        torch.cuda.empty_cache()
        return self._capture(num_places, padded)

    def _capture(self, num_places: int, padded: ImageSize) -> _Graph:
        inputs = self._new_inputs(num_places, padded)
        with _CAPTURING, fastest_kernels():
            for _ in range(WARM_UPS):
                self._forward(inputs)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process may copy and allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = self._forward(inputs)
        self._pool = graph.pool()
        return _Graph(graph, inputs, outputs)

    def _new_inputs(self, num_places: int, padded: ImageSize) -> FixedInputs:
        options: dict[str, Any] = {"device": self.device, "dtype": self._dtype, "memory_format": torch.channels_last}
        return FixedInputs(
            torch.empty((num_places, 3, *padded), **options).zero_(),
            torch.ones(num_places, 2, device=self.device),
            torch.ones(num_places, 2, device=self.device),
            torch.zeros((), device=self.device),
        )

    def _fill(self, inputs: FixedInputs, host: _HostInputs) -> None:
        from model.kernels.input_pixels import lay_out

        lay_out(
            host.pixels,
            host.offsets,
            host.given_sizes.int(),
            host.resized_sizes.int(),
            inputs.pixels,
            recipe=self.recipe,
        )
        inputs.image_sizes.copy_(host.image_sizes)
        inputs.resized_sizes.copy_(host.resized_sizes)
        inputs.score_threshold.copy_(host.score_threshold)


@contextmanager
def fastest_kernels() -> Iterator[None]:
    """cuDNN tries its kernels and takes the fastest, unless the same sums are wanted each time."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _on_device(values: Any, device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=torch.float32), device)


def _to_host(found: FixedOutputs) -> FixedOutputs:
    """In pinned memory, once the stream has come so far."""
    texts = found.mask_texts
    there = {name: to_host(values) for name, values in found._asdict().items() if name != "mask_texts"}
    return FixedOutputs(**there, mask_texts=None if texts is None else MaskTexts(*map(to_host, texts)))

"""The whole forward as CUDA graphs: one for each batch size and padded input, replayed without the host in between.

uint8 images enter; boxes, scores, labels and encoded masks leave in pinned memory, once `Pending.done` has happened.
The host starts a batch and is free to start the next: it waits for nothing but the results it wants to read.
"""

# N images, D detections of an image, M mask side, C candidates.

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
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
from model.structures import ImageSize

MAX_GRAPHS = 64
"""Kept, those used last; each holds its input, and all share the memory they work in."""

STAGED_BYTES = 2**24
"""Of a batch's pixels, at first; buffers grow to what batches need."""

WARM_UPS = 2
"""Runs before a capture: libraries choose their kernels in the first."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Sizes that are captured; a batch is filled up with empty images to the next."""


def can_capture(network: Network, config: ModelConfig, recipe: Recipe) -> bool:
    """Whether the network is of the kind whose every step has fixed shapes, and runs where it can be captured."""
    return (
        network.body.fused
        and (config.neck, config.pooling, config.proposals) == ("fpn", "align", "rpn")
        and config.num_keypoints == 0
        and recipe.resize == "torchvision"
    )


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: FixedInputs
    outputs: FixedOutputs


class CapturedDetector:
    """One network's graphs. It belongs to the thread that calls it."""

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

    def detect(
        self,
        images: Sequence[NDArray[np.uint8]],
        resized: Sequence[ImageSize],
        padded: ImageSize,
        score_threshold: float,
    ) -> RawDetections:
        """Start a batch of images of one padded size."""
        from model.kernels.input_pixels import lay_out

        sizes = [ImageSize(*image.shape[:2]) for image in images]
        num_places = next((size for size in BATCH_SIZES if size >= len(images)), len(images))
        num_empty = num_places - len(images)
        filled = [*images, *[np.zeros((1, 1, 3), np.uint8)] * num_empty]
        graph = self._graph(num_places, padded)
        self._staging.reverse()
        with torch.cuda.stream(self._copies):
            pixels, offsets = self._staging[0].send(filled)
            image_sizes = _on_device([*sizes, *[(1, 1)] * num_empty], self.device)
            resized_sizes = _on_device([*resized, *[(1, 1)] * num_empty], self.device)
            threshold = _on_device(score_threshold, self.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(self._copies)
            for copied in (pixels, offsets, image_sizes, resized_sizes, threshold):
                copied.record_stream(self._stream)
            inputs = graph.inputs
            lay_out(pixels, offsets, image_sizes.int(), resized_sizes.int(), inputs.pixels, recipe=self.recipe)
            inputs.image_sizes.copy_(image_sizes)
            inputs.resized_sizes.copy_(resized_sizes)
            inputs.score_threshold.copy_(threshold)
            graph.graph.replay()
            found = _to_host(graph.outputs)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        pending = Pending(done=done, uncertain=found.uncertain, images=images, score_threshold=score_threshold)
        return RawDetections(
            sizes=sizes,
            boxes=found.boxes,
            scores=found.scores,
            labels=found.labels,
            valid=found.valid,
            mask_logits=None,
            mask_texts=found.mask_texts,
            pending=pending,
        )

    def _graph(self, num_images: int, padded: ImageSize) -> _Graph:
        """The graph of this shape, captured when it is first wanted."""
        key = (num_images, padded)
        if key not in self._graphs:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(num_images, padded)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _capture(self, num_images: int, padded: ImageSize) -> _Graph:
        shape = (num_images, 3, *padded)
        inputs = FixedInputs(
            torch.zeros(shape, dtype=self._dtype, device=self.device).to(memory_format=torch.channels_last),
            torch.ones(num_images, 2, device=self.device),
            torch.ones(num_images, 2, device=self.device),
            torch.zeros((), device=self.device),
        )
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream), _fastest_kernels():
            for _ in range(WARM_UPS):
                self._forward(inputs)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process may copy and allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = self._forward(inputs)
        self._pool = graph.pool()
        return _Graph(graph, inputs, outputs)


def _fastest_kernels() -> AbstractContextManager[None]:
    """cuDNN tries its kernels and takes the fastest; what else is set stays."""
    cudnn = torch.backends.cudnn
    flags: AbstractContextManager[None] = cudnn.flags(
        enabled=True, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32
    )
    return flags


def _on_device(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).pin_memory().to(device, non_blocking=True)


def _to_host(found: FixedOutputs) -> FixedOutputs:
    """In pinned memory, once the stream has come so far."""
    texts = found.mask_texts
    there = {name: _pinned_copy(values) for name, values in found._asdict().items() if name != "mask_texts"}
    return FixedOutputs(**there, mask_texts=None if texts is None else MaskTexts(*map(_pinned_copy, texts)))


def _pinned_copy(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

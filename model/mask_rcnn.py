"""Inference of Mask R-CNN (He et al. 2017) and its family: images enter, the detections of each image leave.

One batched path for every device, with a fixed number of proposals and detections per image and marks of which are
filled. Boxes, anchors and scores are float32 whatever the precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import boxes as box_math
from model import raw_detections, transform
from model.anchors import anchors_of
from model.captured import CapturedDetector, can_capture
from model.config import ModelConfig
from model.forward import Forward, Inputs
from model.network import Network, Precision, ready_to_run
from model.raw_detections import RawDetections
from model.recipe import Recipe
from model.rpn import Proposals
from model.stages import AfterStage, nothing
from model.structures import Detections, ImageSize, sizes_of

# N images, P proposals of an image.

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float32]


class MaskRCNN:
    """A network ready to run."""

    def __init__(
        self,
        network: Network,
        *,
        config: ModelConfig,
        recipe: Recipe,
        categories: Mapping[int, str],
        name: str,
        sha256: str,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        exact: bool = False,
    ) -> None:
        """`network` is kept as it is and a copy runs; `sha256` is that of the weight file's bytes.

        `exact` asks for torchvision's order of computation, which on a CPU gives its boxes and scores to the last bit
        and takes nearly twice as long; without it they differ by rounding, which now and then tips a close decision.
        """
        self.network = network
        self.config = config
        self.recipe = recipe
        self.categories = dict(categories)
        self.name = name
        self.sha256 = sha256
        self.device = _with_index(torch.device(device))
        self.precision: Precision = precision
        self.batch_size = 16 if self.device.type == "cuda" else 1
        """Images of one padded size to give `detect` at a time. On a CPU more gain nothing: caches overflow sooner."""
        self.exact = exact
        self.running = ready_to_run(network, self.device, precision, exact=self.exact)
        """The copy that runs."""
        cells = [cell.to(self.device) for cell in anchors_of(config, recipe)]
        self._forward = Forward(self.running, cells, config=config, recipe=recipe, exact=exact)
        self._captured: CapturedDetector | None = None
        if can_capture(self.running, config, recipe):
            self._captured = CapturedDetector(self.running, cells, config=config, recipe=recipe)
        self.after: AfterStage = nothing
        """Is told the stages of `detect` and `encode`; a GPU then replays no graphs."""
        self.num_repeated = 0
        """Batches that were detected again because fixed shapes did not hold all that might matter."""

    def predict(
        self,
        images: Sequence[Pixels],
        score_threshold: float | None = None,
        *,
        proposals: Sequence[Boxes] | None = None,
    ) -> list[Detections]:
        """Detections of uint8 RGB (H, W, 3) images, in their order; scores are above `score_threshold`.

        A network without an RPN wants `proposals`, (P, 4) for each image in its frame; others take none.
        """
        transform.check_images(images)
        found: dict[int, Detections] = {}
        started: tuple[list[int], RawDetections] | None = None
        for indices in self._batches(sizes_of(images)):
            given = None if proposals is None else [proposals[index] for index in indices]
            raw = self.detect([images[index] for index in indices], score_threshold, proposals=given)
            if started is not None:  # encoded while the device has the next batch
                found.update(zip(started[0], self.encode(started[1]), strict=True))
            started = indices, raw
        if started is not None:
            found.update(zip(started[0], self.encode(started[1]), strict=True))
        return [found[index] for index in range(len(images))]

    def padded_size(self, size: ImageSize) -> ImageSize:
        """The input an image of `size` is laid into; images that share it may be detected in one batch."""
        if self.config.square:
            return ImageSize(self.config.max_size, self.config.max_size)
        return transform.padded_size(self._resized_size(size), divisor=self.recipe.size_divisor)

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Pixels],
        score_threshold: float | None = None,
        *,
        proposals: Sequence[Boxes] | None = None,
        sizes: Sequence[ImageSize] | None = None,
    ) -> RawDetections:
        """The device's work for one batch of images that share their padded size; `encode` waits for it.

        Where `images` are smaller versions, `sizes` are those of the images themselves, in whose frame all is found.
        """
        transform.check_images(images)
        threshold = self._threshold(score_threshold)
        sizes = list(sizes or sizes_of(images))
        if self._captured is not None and proposals is None:
            resized = [self._resized_size(size) for size in sizes]
            padded = self._common_padded_size(sizes)
            return self._captured.detect(images, sizes, resized, padded, threshold, self.after)
        return self._detect(images, sizes, threshold, proposals=proposals)

    def _detect(
        self,
        images: Sequence[Pixels],
        sizes: list[ImageSize],
        threshold: float,
        *,
        proposals: Sequence[Boxes] | None = None,
    ) -> RawDetections:
        """In shapes that hang on the data."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return self._detect_here(images, sizes, threshold, proposals)

    def _detect_here(
        self, images: Sequence[Pixels], sizes: list[ImageSize], threshold: float, proposals: Sequence[Boxes] | None
    ) -> RawDetections:
        padded = self._common_padded_size(sizes)
        resized = [self._resized_size(size) for size in sizes]
        pixels = transform.to_input(images, resized, padded=padded, recipe=self.recipe, device=self.device)
        resized_sizes = torch.tensor(resized, dtype=torch.float32, device=self.device)  # (N, 2)
        image_sizes = torch.tensor(sizes, dtype=torch.float32, device=self.device)  # (N, 2)
        self.after("resize and normalise")
        given = self._given(proposals, resized_sizes / image_sizes)
        inputs = Inputs(pixels, sizes, image_sizes, resized_sizes, given)
        return self._forward.detect(inputs, threshold, self.after)

    @torch.inference_mode()
    def encode(self, raw: RawDetections, score_threshold: float = 0.0) -> list[Detections]:
        """The CPU's work for one batch: masks laid over the image and run-length encoded."""
        pending = raw.pending
        if pending is not None and not pending.is_certain():
            self.num_repeated += 1
            raws = [
                self._detect([image], [size], pending.score_threshold)
                for image, size in zip(pending.images, raw.sizes, strict=True)
            ]
            return [found for one in raws for found in self.encode(one, score_threshold)]
        found = raw_detections.encode(raw, score_threshold, recipe=self.recipe, categories=self.categories)
        self.after("paste and run lengths")
        return found

    def _given(self, proposals: Sequence[Boxes] | None, ratios: Tensor) -> Proposals | None:
        """Proposals in the images' frames, brought to that of the input, where the network has none of its own."""
        if self.running.rpn is not None:
            if proposals is not None:
                raise ValueError("proposals were given to a network that has an RPN; leave them out")
            return None
        if proposals is None or len(proposals) != len(ratios):
            raise ValueError(
                f"this network has no RPN and needs proposals, (P, 4) for each of {len(ratios)} images, "
                f"got {'none' if proposals is None else len(proposals)}; give predict(images, proposals=[...])"
            )
        for index, boxes in enumerate(proposals):
            if boxes.ndim != 2 or boxes.shape[1] != 4:
                raise ValueError(f"proposals of image {index} have shape {boxes.shape}; give (P, 4) x1 y1 x2 y2")
        given = [torch.from_numpy(np.asarray(boxes, dtype=np.float32)) for boxes in proposals]
        padded, valid = box_math.padded(given)  # (N, P, 4), (N, P)
        return Proposals(box_math.scale(padded.to(self.device), ratios[:, None]), valid.to(self.device))

    def _resized_size(self, size: ImageSize) -> ImageSize:
        config, rule = self.config, self.recipe.resize
        return transform.resized_size(size, min_size=config.min_size, max_size=config.max_size, rule=rule)

    def _common_padded_size(self, sizes: Sequence[ImageSize]) -> ImageSize:
        padded = {self.padded_size(size) for size in sizes}
        if len(padded) != 1:
            raise ValueError(
                f"a batch must have one padded size, got {len(padded)} from {len(sizes)} images; "
                "group images by padded_size(), or call predict()"
            )
        return padded.pop()

    def _threshold(self, score_threshold: float | None) -> float:
        threshold = self.recipe.score_threshold if score_threshold is None else score_threshold
        if not 0 <= threshold <= 1:
            raise ValueError(f"score_threshold must be between 0 and 1, got {threshold}")
        return threshold

    def _batches(self, sizes: Sequence[ImageSize]) -> Iterator[list[int]]:
        """Indices of images of one padded size, at most batch_size together."""
        groups: dict[ImageSize, list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(self.padded_size(size), []).append(index)
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]


def _with_index(device: torch.device) -> torch.device:
    """Which of several GPUs "cuda" is hangs on the thread that asks."""
    if str(device) == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device

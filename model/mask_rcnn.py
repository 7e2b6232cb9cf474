"""Mask R-CNN inference (He et al. 2017): images enter, the detections of each image leave.

One batched path for every device, with a fixed number of proposals and detections per image and marks of which are
filled. Boxes, anchors and scores are float32 whatever the precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import boxes as box_math
from model import transform
from model.anchors import cell_anchors
from model.box_head import Chosen, choose
from model.config import ModelConfig, Recipe
from model.exact_roi_align import exact_roi_align
from model.network import Network, Precision, ready_to_run
from model.rle import encode_detections
from model.roi_align import multilevel_roi_align
from model.rpn import Proposals, propose
from model.structures import Detections, ImageSize

# N images, P proposals and D detections of an image, M mask side.

POOLED_STRIDES = (4, 8, 16, 32)
"""Of P2 to P5, the levels regions are pooled from."""


@dataclass(frozen=True, kw_only=True)
class RawDetections:
    """What the device hands over for one batch; D places an image, best first, the empty ones zero."""

    sizes: list[ImageSize]
    """Of the N images as they were given."""
    boxes: Tensor
    """(N, D, 4) float32 in the image's frame."""
    scores: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N, D) class indices."""
    valid: Tensor
    """(N, D) whether the place is filled."""
    mask_logits: Tensor
    """(N, D, M, M) float32 of the detection's own class."""


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
        exact: bool | None = None,
    ) -> None:
        """`network` is kept as it is and a copy runs; `sha256` is that of the weight file's bytes.

        `exact` asks for torchvision's order of computation, which on a CPU gives its boxes and scores to the last bit
        and takes half as long again; without it results differ by rounding, which now and then tips a close decision.
        By default fp32 on a CPU is exact.
        """
        self.network = network
        self.config = config
        self.recipe = recipe
        self.categories = dict(categories)
        self.name = name
        self.sha256 = sha256
        self.device = torch.device(device)
        self.precision: Precision = precision
        self.batch_size = 16 if self.device.type == "cuda" else 1
        """Images of one padded size to give `detect` at a time. On a CPU more gain nothing: caches overflow sooner."""
        self.exact = (self.device.type == "cpu" and precision == "fp32") if exact is None else exact
        self.running = ready_to_run(network, self.device, precision, exact=self.exact)
        """The copy that runs."""
        self._cells = [
            cell_anchors(size, config.aspect_ratios, rounded=recipe.anchors_rounded).to(self.device)
            for size in config.anchor_sizes
        ]

    def predict(self, images: Sequence[NDArray[np.uint8]], score_threshold: float | None = None) -> list[Detections]:
        """Detections of uint8 RGB (H, W, 3) images, in their order; scores are above `score_threshold`."""
        transform.check_images(images)
        found: dict[int, Detections] = {}
        for indices in self._batches([_size_of(image) for image in images]):
            raw = self.detect([images[index] for index in indices], score_threshold)
            found.update(zip(indices, self.encode(raw), strict=True))
        return [found[index] for index in range(len(images))]

    def padded_size(self, size: ImageSize) -> ImageSize:
        """The input an image of `size` is laid into; images that share it may be detected in one batch."""
        return transform.padded_size(self._resized_size(size), divisor=self.recipe.size_divisor)

    @torch.inference_mode()
    def detect(self, images: Sequence[NDArray[np.uint8]], score_threshold: float | None = None) -> RawDetections:
        """The device's work for one batch of images that share their padded size."""
        transform.check_images(images)
        threshold = self._threshold(score_threshold)
        sizes = [_size_of(image) for image in images]
        padded = self._common_padded_size(sizes)
        resized = [self._resized_size(size) for size in sizes]
        pixels = transform.to_input(images, resized, padded=padded, recipe=self.recipe, device=self.device)
        resized_sizes = torch.tensor(resized, dtype=torch.float32, device=self.device)  # (N, 2)
        image_sizes = torch.tensor(sizes, dtype=torch.float32, device=self.device)  # (N, 2)

        levels = self.running.fpn(self.running.body(self._laid_out(pixels)))
        proposals = self._propose(levels, padded, resized_sizes)
        chosen = self._choose(levels, proposals, resized_sizes, threshold)
        mask_logits = self._mask_logits(levels, chosen)
        return RawDetections(
            sizes=sizes,
            boxes=box_math.scale(chosen.boxes, (image_sizes / resized_sizes)[:, None]).cpu(),
            scores=chosen.scores.cpu(),
            labels=chosen.labels.cpu(),
            valid=chosen.valid.cpu(),
            mask_logits=mask_logits.cpu(),
        )

    @torch.inference_mode()
    def encode(self, raw: RawDetections, score_threshold: float = 0.0) -> list[Detections]:
        """The CPU's work for one batch: masks laid over the image and run-length encoded."""
        return [self._encode_image(raw, index, score_threshold) for index in range(len(raw.sizes))]

    def _encode_image(self, raw: RawDetections, index: int, score_threshold: float) -> Detections:
        kept = raw.valid[index] & (raw.scores[index] > score_threshold)
        boxes, labels = raw.boxes[index, kept], raw.labels[index, kept].tolist()
        masks, areas = encode_detections(
            raw.mask_logits[index, kept],
            boxes,
            raw.sizes[index],
            threshold=self.recipe.mask_threshold,
            paste=self.recipe.paste,
        )
        return Detections(
            size=raw.sizes[index],
            boxes=boxes.numpy(),
            scores=raw.scores[index, kept].numpy(),
            category_ids=np.array(labels, dtype=np.int64),
            categories=[self.categories[label] for label in labels],
            masks=masks,
            areas=areas,
        )

    def _propose(self, levels: Sequence[Tensor], padded: ImageSize, resized_sizes: Tensor) -> Proposals:
        return propose(
            [self.running.rpn(level) for level in levels],
            self._cells,
            grids=[ImageSize(*level.shape[-2:]) for level in levels],
            input_size=padded,
            image_sizes=resized_sizes,
            recipe=self.recipe,
        )

    def _choose(
        self, levels: Sequence[Tensor], proposals: Proposals, resized_sizes: Tensor, threshold: float
    ) -> Chosen:
        num_images, num_places = proposals.valid.shape
        image_index = torch.arange(num_images, device=self.device).repeat_interleave(num_places)  # (N P,)
        region_features = self._pool(
            exact_roi_align if self.exact else multilevel_roi_align,
            levels,
            proposals.boxes.flatten(0, 1),
            image_index,
            self.config.box_resolution,
        )
        class_logits, deltas = self.running.box_head(region_features)
        return choose(
            class_logits,
            deltas,
            proposals,
            image_sizes=resized_sizes,
            score_threshold=threshold,
            recipe=self.recipe,
        )

    def _mask_logits(self, levels: Sequence[Tensor], chosen: Chosen) -> Tensor:
        """(N, D, M, M); the head sees only the places that are filled."""
        image_index, place = chosen.valid.nonzero(as_tuple=True)
        resolution = self.config.mask_resolution
        boxes = chosen.boxes[image_index, place]
        region_features = self._pool(multilevel_roi_align, levels, boxes, image_index, resolution)
        mask_logits = chosen.boxes.new_zeros(*chosen.valid.shape, 2 * resolution, 2 * resolution)
        mask_logits[image_index, place] = self.running.mask_head(region_features, chosen.labels[image_index, place])
        return mask_logits

    def _pool(
        self,
        align: Callable[..., Tensor],
        levels: Sequence[Tensor],
        boxes: Tensor,
        image_index: Tensor,
        resolution: int,
    ) -> Tensor:
        return align(
            levels[: len(POOLED_STRIDES)],
            POOLED_STRIDES,
            boxes,
            image_index,
            output_size=resolution,
            sampling_ratio=self.recipe.roi_sampling_ratio,
            aligned=self.recipe.roi_aligned,
        )

    def _laid_out(self, pixels: Tensor) -> Tensor:
        """In the dtype and memory format the body runs in, which those of all that follows are taken from."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return pixels.to(dtype, memory_format=torch.contiguous_format if self.exact else torch.channels_last)

    def _resized_size(self, size: ImageSize) -> ImageSize:
        return transform.resized_size(size, min_size=self.config.min_size, max_size=self.config.max_size)

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


def _size_of(image: NDArray[np.uint8]) -> ImageSize:
    return ImageSize(image.shape[0], image.shape[1])

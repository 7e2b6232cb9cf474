"""Ground truth and the batch a network is trained on: images and their objects enter, padded tensors leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import boxes as box_math
from model import transform
from model.config import ModelConfig
from model.mask_targets import Masks, PackedMasks, resized
from model.recipe import Recipe
from model.structures import ImageSize
from model.transfers import to_device

# N images, G objects of an image, C crowd regions, P given proposals, K keypoints.


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The objects of one image, in its frame."""

    boxes: Tensor
    """(G, 4) float32."""
    labels: Tensor
    """(G,) int64 class indices, 1 and above."""
    masks: Masks | None = None
    """Of the G objects: bitmaps, run lengths or polygons."""
    keypoints: Tensor | None = None
    """(G, K, 3) float32 x, y and visibility, 0 for one that is not labelled."""
    crowd_boxes: Tensor | None = None
    """(C, 4) regions of objects too many to tell apart; nothing in them is trained on as background."""
    proposals: Tensor | None = None
    """(P, 4) regions for a network without an RPN."""

    def __post_init__(self) -> None:
        if self.boxes.dim() != 2 or self.boxes.shape[1] != 4 or len(self.labels) != len(self.boxes):
            raise ValueError(
                f"ground truth needs boxes (G, 4) and labels (G,), got {tuple(self.boxes.shape)} and "
                f"{tuple(self.labels.shape)}"
            )
        for name in ("masks", "keypoints"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.boxes):
                raise ValueError(f"ground truth has {len(self.boxes)} boxes but {len(value)} {name}; give one for each")


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """N images laid into one size, and their objects in the input's frame."""

    pixels: Tensor
    """(N, 3, H, W) float32."""
    image_sizes: Tensor
    """(N, 2) height and width of the images within the padding."""
    gt_boxes: Tensor
    """(N, G, 4)."""
    gt_labels: Tensor
    """(N, G)."""
    gt_valid: Tensor
    """(N, G) whether the place is filled."""
    crowd_boxes: Tensor
    """(N, C, 4)."""
    crowd_valid: Tensor
    """(N, C)."""
    masks: list[Masks] | PackedMasks | None
    """Of each image."""
    seeds: list[int] | None
    """Of each image, for what is drawn at random of it."""
    keypoints: Tensor | None
    """(N, G, K, 3)."""
    proposals: Tensor | None
    """(N, P, 4)."""
    proposals_valid: Tensor | None
    """(N, P)."""

    def to(self, device: torch.device) -> TrainingBatch:
        """The same on a device; masks that are not bitmaps stay on the host."""
        return replace(self, **{field.name: _moved(getattr(self, field.name), device) for field in fields(self)})


class Frames(NamedTuple):
    """Where the images of a batch lie in its input."""

    sizes: list[ImageSize]
    """As they were given."""
    to_sizes: list[ImageSize]
    """What they are resized to."""
    padded: ImageSize
    """The input's."""

    def ratios(self) -> list[Tensor]:
        """Of each image (2,), what its height and width are multiplied by."""
        return [
            torch.tensor(to_size, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
            for size, to_size in zip(self.sizes, self.to_sizes, strict=True)
        ]


def collate(
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[GroundTruth],
    *,
    config: ModelConfig,
    recipe: Recipe,
    to_sizes: Sequence[ImageSize] | None = None,
    padded: ImageSize | None = None,
    seeds: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> TrainingBatch:
    """Images, uint8 RGB (H, W, 3), brought to `to_sizes`, by default those of inference, and laid into one input.

    `padded` is the least size of the input; workers that share a batch give that of its largest image, for what is
    computed near the edge of an image changes with the padding beside it.
    """
    device = torch.device(device)
    frames = frames_of(images, truths, config=config, recipe=recipe, to_sizes=to_sizes, padded=padded)
    objects = objects_of(truths, frames, config=config, seeds=seeds)
    pixels = transform.to_input(images, frames.to_sizes, padded=frames.padded, recipe=recipe, device=device)
    masks: list[Masks] | None = None
    if config.mask_head != "none":
        masks = [
            resized(truth.masks, size, to_size)
            for truth, size, to_size in zip(truths, frames.sizes, frames.to_sizes, strict=True)
            if truth.masks is not None
        ]
    return replace(objects, pixels=pixels, masks=masks).to(device)


def frames_of(
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[GroundTruth],
    *,
    config: ModelConfig,
    recipe: Recipe,
    to_sizes: Sequence[ImageSize] | None,
    padded: ImageSize | None,
) -> Frames:
    """Those that `collate` lays its images into.

    Raises:
        ValueError: an image or its ground truth is not what the network is trained with.
    """
    transform.check_images(images)
    if len(images) != len(truths) or not images:
        raise ValueError(f"a batch needs a ground truth for each image, got {len(images)} and {len(truths)}")
    _check_parts(truths, config)
    sizes = [ImageSize(*image.shape[:2]) for image in images]
    to_sizes = to_sizes or [
        transform.resized_size(size, min_size=config.min_size, max_size=config.max_size, rule=recipe.resize)
        for size in sizes
    ]
    padded = transform.common_size([*to_sizes, *([padded] if padded else [])], divisor=recipe.size_divisor)
    return Frames(sizes, list(to_sizes), ImageSize(config.max_size, config.max_size) if config.square else padded)


def objects_of(
    truths: Sequence[GroundTruth], frames: Frames, *, config: ModelConfig, seeds: Sequence[int] | None
) -> TrainingBatch:
    """The batch but for its pixels and masks."""
    ratios = frames.ratios()
    gt_boxes, gt_valid = _placed([truth.boxes for truth in truths], ratios)
    crowd_boxes, crowd_valid = _placed(
        [torch.zeros(0, 4) if truth.crowd_boxes is None else truth.crowd_boxes for truth in truths], ratios
    )
    proposals: tuple[Tensor | None, Tensor | None] = (None, None)
    if config.proposals == "given":
        proposals = _placed([truth.proposals for truth in truths if truth.proposals is not None], ratios)
    return TrainingBatch(
        pixels=torch.zeros(len(truths), 3, 0, 0),
        image_sizes=torch.tensor(frames.to_sizes, dtype=torch.float32),
        gt_boxes=gt_boxes,
        gt_labels=pad_sequence([truth.labels for truth in truths], batch_first=True),
        gt_valid=gt_valid,
        crowd_boxes=crowd_boxes,
        crowd_valid=crowd_valid,
        masks=None,
        seeds=None if seeds is None else list(seeds),
        keypoints=_scaled_keypoints(truths, ratios) if config.num_keypoints else None,
        proposals=proposals[0],
        proposals_valid=proposals[1],
    )


def _placed(boxes: Sequence[Tensor], ratios: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes of each image in the input's frame, as `boxes.padded` gives them."""
    return box_math.padded([box_math.scale(one, ratio) for one, ratio in zip(boxes, ratios, strict=True)])


def _check_parts(truths: Sequence[GroundTruth], config: ModelConfig) -> None:
    wanted = {
        "masks": config.mask_head != "none",
        "keypoints": config.num_keypoints > 0,
        "proposals": config.proposals == "given",
    }
    for index, truth in enumerate(truths):
        for name in (name for name, is_wanted in wanted.items() if is_wanted):
            if getattr(truth, name) is None:
                raise ValueError(f"ground truth {index} has no {name}, which this network is trained with; give them")
        if len(truth.labels) and not 1 <= int(truth.labels.min()) <= int(truth.labels.max()) < config.num_classes:
            raise ValueError(
                f"ground truth {index} has labels from {int(truth.labels.min())} to {int(truth.labels.max())}; "
                f"the network's classes are 1 to {config.num_classes - 1}"
            )
        if (
            wanted["keypoints"]
            and truth.keypoints is not None
            and truth.keypoints.shape[1:] != (config.num_keypoints, 3)
        ):
            raise ValueError(
                f"ground truth {index} has keypoints {tuple(truth.keypoints.shape)}; "
                f"give ({len(truth.boxes)}, {config.num_keypoints}, 3)"
            )


def _scaled_keypoints(truths: Sequence[GroundTruth], ratios: Sequence[Tensor]) -> Tensor:
    scaled = [
        truth.keypoints * torch.cat([ratio.flip(0), torch.ones(1)])
        for truth, ratio in zip(truths, ratios, strict=True)
        if truth.keypoints is not None
    ]
    return pad_sequence(scaled, batch_first=True)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return to_device(value, device)
    if isinstance(value, list):
        return [to_device(item, device) if isinstance(item, Tensor) else item for item in value]
    return value

"""Random changes of an image and its objects while training: mirrored, turned, cut, recoloured.

In two steps, as every worker of a run must know the sizes of images that only another one loads. `draw_geometry` needs
no more than an image's annotated size; `apply` takes the pixels, uint8 RGB (H, W, 3), and the ground truth, and gives
both in the frame of the window. Nothing is resized here: `model.ground_truth` brings the window to its size.

Large-scale jitter: Ghiasi et al. 2021, which detectron2 makes of ResizeScale and FixedSizeCrop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.transforms.v2 import functional

from model import boxes as box_math
from model.ground_truth import GroundTruth
from model.mask_targets import Masks
from model.structures import ImageSize
from model.transform import resized_size
from pipeline.errors import ConfigError

# G objects, P proposals, K keypoints of an object, (H, W) the image as it was given, (h, w) the window.

_MIN_SIDE = 1.0
"""An object that the window leaves less of is dropped, pixels."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How far images are changed; the defaults mirror every other one."""

    flip: float = 0.5
    """Probability of mirroring left to right."""
    quarter_turns: bool = False
    """Turned by 0, 90, 180 or 270 degrees, for images that have no up: microscopy, aerial."""
    min_sizes: tuple[int, ...] = ()
    """Short sides, pixels, one drawn for each image; none: the model's own."""
    scales: tuple[float, float] = (1.0, 1.0)
    """Bounds of a factor on the resized size."""
    crop: int | None = None
    """Side of a square window, pixels of the resized image, cut at a random place where that is larger."""
    brightness: float = 0.0
    """The factor is drawn from 1 - brightness to 1 + brightness and never below 0; so with the next two."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Bound of the shift either way, in turns of the colour circle."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip must be from 0 to 1, got {self.flip}")
        if any(side < 1 for side in self.min_sizes):
            raise ConfigError(f"min_sizes must be at least 1 each, got {self.min_sizes}")
        if len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1] < math.inf:
            raise ConfigError(f"scales must be two factors above 0, the lower first, got {self.scales}")
        if self.crop is not None and self.crop < 1:
            raise ConfigError(f"crop must be at least 1, got {self.crop}; leave it out for no crop")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"hue must be from 0 to 0.5, got {self.hue}")


class Window(NamedTuple):
    """Whole pixels of the image as it is once turned and mirrored; the ends are not in it."""

    y1: int
    x1: int
    y2: int
    x2: int


@dataclass(frozen=True)
class Geometry:
    """What is done to an image's frame, in this order: turned, mirrored, cut, resized."""

    flip: bool
    turns: int
    """How often by 90 degrees counter-clockwise."""
    window: Window
    to_size: ImageSize
    """What the window is to be resized to."""


def draw_geometry(
    size: ImageSize,
    *,
    config: AugmentConfig,
    min_size: int,
    max_size: int,
    rule: Literal["torchvision", "detectron2"],
    rng: Generator,
) -> Geometry:
    """For an image of `size`; `min_size`, `max_size` and `rule` are those of `model.transform.resized_size`."""
    # All are drawn whatever the config asks for, so that one part of it does not change what the others give.
    flip, turn, side, scale, top, left = rng.random(6).tolist()
    turns = int(turn * 4) if config.quarter_turns else 0
    turned = _turned_size(size, turns)
    if config.min_sizes:
        min_size = config.min_sizes[int(side * len(config.min_sizes))]
    resized = resized_size(turned, min_size=min_size, max_size=max_size, rule=rule)
    factor = config.scales[0] + scale * (config.scales[1] - config.scales[0])
    scaled = ImageSize(*(max(1, math.floor(length * factor + 0.5)) for length in resized))
    y1, y2, height = _draw_span(turned.height, scaled.height, config.crop, top)
    x1, x2, width = _draw_span(turned.width, scaled.width, config.crop, left)
    return Geometry(
        flip=flip < config.flip, turns=turns, window=Window(y1, x1, y2, x2), to_size=ImageSize(height, width)
    )


def apply(
    image: NDArray[np.uint8],
    truth: GroundTruth,
    geometry: Geometry,
    *,
    config: AugmentConfig,
    rng: Generator,
    flip_pairs: tuple[tuple[int, int], ...] = (),
) -> tuple[NDArray[np.uint8], GroundTruth]:
    """The window (h, w, 3) and what of the ground truth lies in it, masks as uint8 bitmaps (G, h, w).

    A window smaller than the image cuts objects, and their boxes become those of what their masks have left, or are
    clipped where there are no masks. `flip_pairs` are the keypoints that mirroring exchanges: left and right eye.
    """
    size = ImageSize(*image.shape[:2])
    turned = _turned_size(size, geometry.turns)
    if geometry.window.y2 > turned.height or geometry.window.x2 > turned.width:
        raise ConfigError(f"an image of {size} does not hold {geometry}; are the annotations those of this image?")
    # A copy, as torch takes neither negative strides nor read-only memory.
    pixels = _window(torch.from_numpy(image.copy()), geometry)  # (h, w, 3)
    return _jitter(pixels, config, rng), _change_truth(truth, size, geometry, flip_pairs)


def _draw_span(length: int, resized: int, crop: int | None, place: float) -> tuple[int, int, int]:
    """First and end pixel of the window along one side of the image, and what that is resized to; place in 0..1."""
    if crop is None or resized <= crop:
        return 0, length, resized
    inside = max(1, math.floor(crop * length / resized + 0.5))
    start = int(place * (length - inside + 1))
    return start, start + inside, crop


def _turned_size(size: ImageSize, turns: int) -> ImageSize:
    return ImageSize(size.width, size.height) if turns % 2 else size


def _window(pixels: Tensor, geometry: Geometry) -> Tensor:
    """(h, w, …) what an image or a mask (H, W, …) shows in the window."""
    turned = torch.rot90(pixels, geometry.turns) if geometry.turns else pixels  # which would copy it
    mirrored = turned.flip(1) if geometry.flip else turned
    y1, x1, y2, x2 = geometry.window
    return mirrored[y1:y2, x1:x2]


def _jitter(pixels: Tensor, config: AugmentConfig, rng: Generator) -> NDArray[np.uint8]:
    """(h, w, 3) with other colours, changed one way after another in a random order."""
    order = rng.permutation(4).tolist()
    draws = rng.uniform(-1, 1, 4).tolist()
    steps = [
        (functional.adjust_brightness, config.brightness, max(0.0, 1 + draws[0] * config.brightness)),
        (functional.adjust_contrast, config.contrast, max(0.0, 1 + draws[1] * config.contrast)),
        (functional.adjust_saturation, config.saturation, max(0.0, 1 + draws[2] * config.saturation)),
        (functional.adjust_hue, config.hue, draws[3] * config.hue),
    ]
    values = pixels.permute(2, 0, 1)  # (3, h, w)
    for adjust, bound, amount in (steps[index] for index in order):
        if bound > 0:
            values = adjust(values, amount)
    changed: NDArray[np.uint8] = values.permute(1, 2, 0).contiguous().numpy()
    return changed


def _change_truth(
    truth: GroundTruth, size: ImageSize, geometry: Geometry, flip_pairs: tuple[tuple[int, int], ...]
) -> GroundTruth:
    boxes, kept = _move_boxes(truth.boxes, size, geometry, min_side=_MIN_SIDE)
    masks = truth.masks
    if masks is not None:
        masks, kept = _cut_masks(masks, kept, size, geometry)
    boxes = boxes[kept]
    if masks is not None and _is_cut(size, geometry):
        boxes = _tight_boxes(masks).to(boxes.dtype)
    return replace(
        truth,
        boxes=boxes,
        labels=truth.labels[kept],
        masks=masks,
        keypoints=None
        if truth.keypoints is None
        else _move_keypoints(truth.keypoints[kept], size, geometry, flip_pairs),
        crowd_boxes=None if truth.crowd_boxes is None else _move_regions(truth.crowd_boxes, size, geometry),
        proposals=None if truth.proposals is None else _move_regions(truth.proposals, size, geometry),
    )


def _is_cut(size: ImageSize, geometry: Geometry) -> bool:
    return geometry.window != (0, 0, *_turned_size(size, geometry.turns))


def _move_points(points: Tensor, size: ImageSize, geometry: Geometry) -> Tensor:
    """(..., 2) x, y in the window, of those in the image."""
    x, y = points.unbind(-1)
    height, width = size
    for _ in range(geometry.turns % 4):
        x, y = y, width - x
        height, width = width, height
    if geometry.flip:
        x = width - x
    return torch.stack([x - geometry.window.x1, y - geometry.window.y1], dim=-1)


def _move_boxes(boxes: Tensor, size: ImageSize, geometry: Geometry, *, min_side: float) -> tuple[Tensor, Tensor]:
    """(B, 4) the boxes in the window, clipped if it cuts anything, and (B,) whether it leaves `min_side` of them.

    One that it does not touch stays, however small.
    """
    corners = _move_points(boxes.reshape(-1, 2, 2), size, geometry)  # (B, 2, 2)
    moved = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)  # (B, 4)
    if not _is_cut(size, geometry):
        return moved, torch.ones(len(moved), dtype=torch.bool)
    y1, x1, y2, x2 = geometry.window
    clipped = box_math.clip(moved, moved.new_tensor([y2 - y1, x2 - x1]))
    return clipped, box_math.wide_enough(clipped, min_side) | (clipped == moved).all(dim=1)


def _move_regions(boxes: Tensor, size: ImageSize, geometry: Geometry) -> Tensor:
    """Crowd boxes or proposals in the window, without those it leaves nothing of."""
    moved, kept = _move_boxes(boxes, size, geometry, min_side=torch.finfo(boxes.dtype).tiny)
    return moved[kept]


def _move_keypoints(
    keypoints: Tensor, size: ImageSize, geometry: Geometry, flip_pairs: tuple[tuple[int, int], ...]
) -> Tensor:
    """(G, K, 3) in the window; zeros for one outside it or not labelled, as in COCO."""
    points = _move_points(keypoints[..., :2], size, geometry)  # (G, K, 2)
    y1, x1, y2, x2 = geometry.window
    inside = ((points >= 0) & (points <= points.new_tensor([x2 - x1, y2 - y1]))).all(dim=-1)
    there = inside & (keypoints[..., 2] > 0)  # (G, K)
    moved = torch.cat([points, keypoints[..., 2:]], dim=-1).where(there[..., None], 0)
    if geometry.flip:
        order = list(range(keypoints.shape[1]))
        for left, right in flip_pairs:
            order[left], order[right] = order[right], order[left]
        moved = moved[:, order]
    return moved


def _cut_masks(masks: Masks, kept: Tensor, size: ImageSize, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Bitmaps (g, h, w) of the g kept objects with a pixel left, one full-size bitmap held at a time; and `kept` (G,)
    without the others."""
    y1, x1, y2, x2 = geometry.window
    chosen = kept.nonzero()[:, 0].tolist()
    cut = torch.zeros(len(chosen), y2 - y1, x2 - x1, dtype=torch.uint8)
    for place, index in zip(cut, chosen, strict=True):
        bitmap = _bitmap(masks[index])  # (H, W)
        if tuple(bitmap.shape) != tuple(size):
            raise ConfigError(f"masks must have the size of their image {size}, got {tuple(bitmap.shape)}")
        place.copy_(_window(bitmap, geometry))
    seen = cut.flatten(1).amax(dim=1) > 0  # (g,)
    remaining = kept.clone()
    remaining[kept] = seen
    return cut if bool(seen.all()) else cut[seen], remaining


def _bitmap(mask: object) -> Tensor:
    """(H, W)."""
    if isinstance(mask, Tensor):
        return mask
    if isinstance(mask, dict):
        return torch.from_numpy(coco_mask.decode(mask))
    raise ConfigError(
        f"masks must be bitmaps or run lengths to be augmented, got {type(mask).__name__}; "
        "draw polygons first (pycocotools.mask.frPyObjects, then merge)"
    )


def _tight_boxes(bitmaps: Tensor) -> Tensor:
    """(G, 4) the smallest boxes that hold all pixels of bitmaps (G, h, w), none of them empty."""
    sides: list[Tensor] = []
    for axis in (1, 2):
        hit = (bitmaps.amax(dim=axis) > 0).int()  # (G, w), then (G, h)
        sides += [hit.argmax(dim=1), hit.shape[1] - hit.flip(1).argmax(dim=1)]
    x1, x2, y1, y2 = sides
    return torch.stack([x1, y1, x2, y2], dim=1)

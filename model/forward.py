"""From the network's input to detections, in shapes that hang on the data: any network, on every device.

`fixed_forward.py` is the same in fixed shapes, for a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model import boxes as box_math
from model.anchors import cell_strides
from model.box_head import Chosen, choose
from model.config import ModelConfig
from model.keypoints import decode_heatmaps
from model.network import Network
from model.pooling import image_of_place, pool_regions
from model.raw_detections import RawDetections
from model.recipe import Recipe
from model.rpn import Proposals, propose
from model.stages import AfterStage
from model.structures import ImageSize

# N images, P proposals and D detections of an image, M mask side, K keypoints, C channels, R regions, S pooled side.

RES5_REGIONS = 128
"""Regions that res5 runs on at once: 2,048 × 14 × 14 values each at its widest."""


class Inputs(NamedTuple):
    """What the forward reads."""

    pixels: Tensor
    """(N, 3, H, W)."""
    sizes: list[ImageSize]
    """Of the images as they were given."""
    image_sizes: Tensor
    """(N, 2) float32 the same, on the device."""
    resized_sizes: Tensor
    """(N, 2) float32 of the images inside the padding."""
    proposals: Proposals | None
    """In the input's frame, for a network without an RPN."""


class Forward:
    """A network ready to run, and the conventions it runs by."""

    def __init__(
        self, network: Network, cells: Sequence[Tensor], *, config: ModelConfig, recipe: Recipe, exact: bool
    ) -> None:
        """`cells` are the anchors of a cell of each level; `exact` is as `MaskRCNN` has it."""
        self.network, self.config, self.recipe, self.exact = network, config, recipe, exact
        self._cells = cells

    def detect(self, inputs: Inputs, score_threshold: float, after: AfterStage) -> RawDetections:
        """The detections, on the host; `after` is told each stage that has been started."""
        levels = self.network.features(self._laid_out(inputs.pixels))
        after("body and pyramid")
        proposals = self._propose(levels, inputs, after)
        chosen = self._choose(levels, proposals, inputs, score_threshold, after)
        ratios = (inputs.image_sizes / inputs.resized_sizes)[:, None]  # (N, 1, 2)
        mask_logits = self._mask_logits(levels, chosen, after)
        keypoints = self._keypoints(levels, chosen, ratios)
        return RawDetections(
            sizes=inputs.sizes,
            boxes=box_math.scale(chosen.boxes, ratios).cpu(),
            scores=chosen.scores.cpu(),
            labels=chosen.labels.cpu(),
            valid=chosen.valid.cpu(),
            mask_logits=None if mask_logits is None else mask_logits.cpu(),
            keypoints=None if keypoints is None else keypoints.cpu(),
        )

    def _propose(self, levels: Sequence[Tensor], inputs: Inputs, after: AfterStage) -> Proposals:
        rpn = self.network.rpn
        if rpn is None:
            assert inputs.proposals is not None
            return inputs.proposals
        grids = [ImageSize(*level.shape[-2:]) for level in levels]
        outputs = [rpn(level) for level in levels]
        after("RPN head")
        proposals = propose(
            outputs,
            self._cells,
            grids=grids,
            strides=cell_strides(ImageSize(*inputs.pixels.shape[-2:]), grids, rule=self.recipe.anchor_strides),
            image_sizes=inputs.resized_sizes,
            recipe=self.recipe,
        )
        after("proposals")
        return proposals

    def _choose(
        self, levels: Sequence[Tensor], proposals: Proposals, inputs: Inputs, score_threshold: float, after: AfterStage
    ) -> Chosen:
        boxes, image_index = proposals.boxes.flatten(0, 1), image_of_place(proposals.valid)  # (N P, 4), (N P,)
        region_features = self._region_features(levels, boxes, image_index, self.config.box_resolution)
        after("RoIAlign for boxes")
        class_logits, deltas = self.network.box_head(region_features)
        after("box head")
        chosen = choose(
            class_logits,
            deltas,
            proposals,
            image_sizes=inputs.resized_sizes,
            score_threshold=score_threshold,
            recipe=self.recipe,
        )
        after("detections")
        return chosen

    def _mask_logits(self, levels: Sequence[Tensor], chosen: Chosen, after: AfterStage) -> Tensor | None:
        """(N, D, M, M); the head sees only the places that are filled."""
        head, side = self.network.mask_head, self.config.mask_side
        if head is None:
            return None
        image_index, place = chosen.valid.nonzero(as_tuple=True)
        boxes, labels = chosen.boxes[image_index, place], chosen.labels[image_index, place]
        features = self._region_features(levels, boxes, image_index, self.config.mask_resolution, exact=False)
        after("RoIAlign for masks")
        mask_logits = chosen.boxes.new_zeros(*chosen.valid.shape, side, side)
        mask_logits[image_index, place] = head(features, labels)
        after("mask head")
        return mask_logits

    def _keypoints(self, levels: Sequence[Tensor], chosen: Chosen, ratios: Tensor) -> Tensor | None:
        """(N, D, K, 3) in the images' frames."""
        head = self.network.keypoint_head
        if head is None:
            return None
        image_index, place = chosen.valid.nonzero(as_tuple=True)
        boxes = chosen.boxes[image_index, place]  # (B, 4)
        features = self._region_features(levels, boxes, image_index, self.config.keypoint_resolution)
        found = decode_heatmaps(head(features).float(), boxes, score=self.recipe.keypoint_score)  # (B, K, 3)
        found[..., :2] *= ratios[image_index].flip(-1)
        keypoints = found.new_zeros(*chosen.valid.shape, *found.shape[1:])
        keypoints[image_index, place] = found
        return keypoints

    def _region_features(
        self,
        levels: Sequence[Tensor],
        boxes: Tensor,
        image_index: Tensor,
        resolution: int,
        *,
        exact: bool | None = None,
    ) -> Tensor:
        """(R, C, S, S), some regions at a time where res5 makes them wide."""
        step = max(1, len(boxes) if self.network.res5 is None else RES5_REGIONS)
        parts = [
            self.network.of_regions(
                pool_regions(
                    levels,
                    self.network.strides,
                    boxes[start : start + step],
                    image_index[start : start + step],
                    resolution=resolution,
                    config=self.config,
                    recipe=self.recipe,
                    exact=self.exact if exact is None else exact,
                )
            )
            for start in range(0, max(1, len(boxes)), step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _laid_out(self, pixels: Tensor) -> Tensor:
        """In the dtype and memory format the body begins in."""
        dtype = self.network.body.stem.conv.weight.dtype
        return pixels.to(dtype, memory_format=torch.contiguous_format if self.exact else torch.channels_last)

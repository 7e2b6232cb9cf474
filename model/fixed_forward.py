"""From the network's input to detections with encoded masks in tensors of fixed shapes, none of which asks the host.

What `captured.py` captures. The same as `forward.py`, whose shapes hang on the data.
"""

# N images, P proposals, D detections of an image, M mask side.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model import boxes as box_math
from model.anchors import cell_strides
from model.config import ModelConfig
from model.fixed_shapes import choose_fixed, propose_fixed
from model.network import Network
from model.pooling import image_of_place
from model.raw_detections import MaskTexts
from model.recipe import Recipe
from model.roi_align import assign_levels
from model.stages import AfterStage, nothing
from model.structures import ImageSize

RUNS_PER_IMAGE, TEXT_PER_IMAGE = 200_000, 400_000
"""Runs and bytes that the masks of an image may take on average over a batch. More is encoded on the host."""


class FixedInputs(NamedTuple):
    """What the forward reads."""

    pixels: Tensor
    """(N, 3, H, W), channels-last, in the dtype the network runs in."""
    image_sizes: Tensor
    """(N, 2) float32 height and width of the images as they were given."""
    resized_sizes: Tensor
    """(N, 2) float32 of the images inside the padding."""
    score_threshold: Tensor
    """() float32."""


class FixedOutputs(NamedTuple):
    """As in RawDetections."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor
    uncertain: Tensor
    """(U,) bool, whether something did not fit that might matter."""
    mask_texts: MaskTexts | None = None


@torch.inference_mode()
def detect_fixed(
    network: Network,
    inputs: FixedInputs,
    *,
    cells: Sequence[Tensor],
    config: ModelConfig,
    recipe: Recipe,
    after: AfterStage = nothing,
) -> FixedOutputs:
    """The detections; `after` is told each stage that has been started."""
    from model.kernels.nms import sorted_nms

    assert network.rpn is not None
    levels = network.features(inputs.pixels)
    after("body and pyramid")
    rpn_outputs = [network.rpn(level) for level in levels]
    after("RPN head")
    grids = [ImageSize(*level.shape[-2:]) for level in levels]
    proposals = propose_fixed(
        rpn_outputs,
        cells,
        grids=grids,
        strides=cell_strides(ImageSize(*inputs.pixels.shape[-2:]), grids, rule=recipe.anchor_strides),
        image_sizes=inputs.resized_sizes,
        recipe=recipe,
        nms=sorted_nms,
    )
    after("proposals")
    pool = _Pool(network, levels, recipe)
    features = pool(proposals.boxes, proposals.valid, config.box_resolution)
    after("RoIAlign for boxes")
    class_logits, deltas = network.box_head(features)
    after("box head")
    chosen, uncertain = choose_fixed(
        class_logits,
        deltas,
        proposals,
        image_sizes=inputs.resized_sizes,
        score_threshold=inputs.score_threshold,
        recipe=recipe,
        nms=sorted_nms,
    )
    after("detections")
    ratios = (inputs.image_sizes / inputs.resized_sizes)[:, None]  # (N, 1, 2)
    found = FixedOutputs(box_math.scale(chosen.boxes, ratios), chosen.scores, chosen.labels, chosen.valid, uncertain)
    if network.mask_head is None:
        return found
    features = pool(chosen.boxes, chosen.valid, config.mask_resolution)
    after("RoIAlign for masks")
    logits = network.mask_head(features, chosen.labels.flatten())  # (N D, M, M)
    after("mask head")
    masks, too_many = _encoded(logits.unflatten(0, chosen.valid.shape), found, inputs, recipe)
    after("paste and run lengths")
    return found._replace(uncertain=torch.cat([uncertain, too_many]), mask_texts=masks)


def _encoded(logits: Tensor, found: FixedOutputs, inputs: FixedInputs, recipe: Recipe) -> tuple[MaskTexts, Tensor]:
    """The masks of logits (N, D, M, M), and (2,) bool whether they have more runs or bytes than there is room for."""
    from model.kernels.mask_runs import encode_masks

    num_images = len(logits)
    run_capacity, text_capacity = num_images * RUNS_PER_IMAGE, num_images * TEXT_PER_IMAGE
    masks = encode_masks(
        logits,
        found.boxes,
        inputs.image_sizes,
        found.valid,
        threshold=recipe.mask_threshold,
        paste=recipe.paste,
        run_capacity=run_capacity,
        text_capacity=text_capacity,
    )
    return masks, torch.stack([masks.needed[0] > run_capacity, masks.needed[1] > text_capacity])


class _Pool:
    """RoIAlign of the levels that regions are pooled from."""

    def __init__(self, network: Network, levels: Sequence[Tensor], recipe: Recipe) -> None:
        self.strides, self.recipe = network.strides, recipe
        self.levels = levels[: len(network.strides)]

    def __call__(self, boxes: Tensor, valid: Tensor, resolution: int) -> Tensor:
        """(N P, C, S, S) of boxes (N, P, 4)."""
        from model.kernels.roi_align import roi_align

        boxes = boxes.flatten(0, 1)
        return roi_align(
            self.levels,
            self.strides,
            boxes,
            image_of_place(valid),
            assign_levels(boxes, len(self.strides), rounding=self.recipe.roi_levels),
            output_size=resolution,
            sampling_ratio=self.recipe.roi_sampling_ratio,
            aligned=self.recipe.roi_aligned,
        )

"""RoIPool over the levels of a feature pyramid (Girshick 2015), which RoIAlign is measured against in Mask R-CNN.

In: maps of every level, boxes in the input frame, the image each box lies in. Out: one fixed-size map per box.

A box's edges are rounded to whole cells, both of them its own; a bin is the largest of the cells it touches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import roi_pool

from model.boxes import full_precision
from model.roi_align import assign_levels

# N images, C channels, R regions, S pooled side.

_OUTSIDE = -1e6
"""All four edges of a box that is not finite: it pools zeros, where no whole number would be its cell."""


def multilevel_roi_pool(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_index: Tensor,
    *,
    output_size: int,
    rounding: Literal["torchvision", "detectron2"] = "torchvision",
) -> Tensor:
    """(R, C, S, S) each box of (R, 4) pooled from its own one of the levels (N, C, H, W), in their dtype."""
    if len(features) != len(strides):
        raise ValueError(f"features and strides must be as many, got {len(features)} and {len(strides)}")
    boxes = boxes.where(boxes.isfinite().all(dim=1, keepdim=True), _OUTSIDE)
    first_level = int(math.log2(strides[0]))
    level_index = assign_levels(boxes, len(features), first_level=first_level, rounding=rounding)  # (R,)
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)  # (R, 5)
    pooled = features[0].new_empty(len(boxes), features[0].shape[1], output_size, output_size)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        chosen = (level_index == level).nonzero().flatten()
        # there is no bfloat16 kernel, and a box in bfloat16 would move by pixels
        precise = full_precision(feature)
        pooled[chosen] = roi_pool(precise, rois[chosen].to(precise), output_size, 1 / stride).to(pooled.dtype)
    return pooled

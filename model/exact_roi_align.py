"""RoIAlign over the levels of a pyramid by torchvision's own operator, summed in its order.

Slower than `roi_align.multilevel_roi_align`, which takes and gives the same; equal to torchvision to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import roi_align

from model.roi_align import assign_levels

# N images, C channels, R regions, S pooled side.


def exact_roi_align(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_index: Tensor,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    rounding: Literal["torchvision", "detectron2"] = "torchvision",
) -> Tensor:
    """(R, C, S, S) each box pooled from its own one of the levels (N, C, H, W)."""
    first_level = int(math.log2(strides[0]))
    level_index = assign_levels(boxes, len(features), first_level=first_level, rounding=rounding)  # (R,)
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)  # (R, 5)
    pooled = features[0].new_zeros(len(boxes), features[0].shape[1], output_size, output_size)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        chosen = (level_index == level).nonzero().flatten()
        # there is no bfloat16 kernel, and a box in bfloat16 would move by pixels
        precise = feature.to(torch.promote_types(feature.dtype, torch.float32))
        maps = roi_align(precise, rois[chosen].to(precise), output_size, 1 / stride, sampling_ratio, aligned)
        pooled[chosen] = maps.to(pooled.dtype)
    return pooled

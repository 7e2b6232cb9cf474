"""RoIAlign over the levels of a pyramid by torchvision's own operator, summed in its order.

Slower than `roi_align.multilevel_roi_align`, which takes and gives the same; equal to torchvision to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

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
) -> Tensor:
    """(R, C, S, S) each box pooled from its own one of the levels (N, C, H, W), the first of which is P2."""
    level_index = assign_levels(boxes, len(features))  # (R,)
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)  # (R, 5)
    pooled = boxes.new_zeros(len(boxes), features[0].shape[1], output_size, output_size)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        chosen = (level_index == level).nonzero().flatten()
        pooled[chosen] = roi_align(feature, rois[chosen], output_size, 1 / stride, sampling_ratio, aligned)
    return pooled

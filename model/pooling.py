"""The features of regions: levels and boxes enter, a small map for each box leaves, by the operator a config names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.exact_roi_align import exact_roi_align
from model.kernels import run_kernels_on
from model.recipe import Recipe
from model.roi_align import multilevel_roi_align
from model.roi_pool import multilevel_roi_pool

# N images, C channels, R regions, P places of an image, S pooled side.


def pool_regions(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_index: Tensor,
    *,
    resolution: int,
    config: ModelConfig,
    recipe: Recipe,
    exact: bool = False,
) -> Tensor:
    """(R, C, S, S) of boxes (R, 4) in the input's frame, each from its own one of the levels (N, C, H, W).

    `exact` takes RoIAlign by torchvision's operator, in its order of sums.
    """
    levels = levels[: len(strides)]  # P6 serves the RPN alone
    if config.pooling == "pool":
        return multilevel_roi_pool(
            levels, strides, boxes, image_index, output_size=resolution, rounding=recipe.roi_levels
        )
    align = exact_roi_align if exact else multilevel_roi_align
    return align(
        levels,
        strides,
        boxes,
        image_index,
        output_size=resolution,
        sampling_ratio=recipe.roi_sampling_ratio,
        aligned=recipe.roi_aligned,
        rounding=recipe.roi_levels,
    )


def to_be_pooled(levels: list[Tensor], strides: Sequence[int]) -> list[Tensor]:
    """The same levels; on a GPU those that regions are pooled from have one gradient of all poolings together."""
    if not run_kernels_on(levels[0].device):
        return levels
    from model.kernels.roi_align import share_gradients

    return [*share_gradients(levels[: len(strides)]), *levels[len(strides) :]]


def image_of_place(valid: Tensor) -> Tensor:
    """(N P,) the image each place of (N, P) belongs to."""
    num_images, num_places = valid.shape
    return torch.arange(num_images, device=valid.device).repeat_interleave(num_places)

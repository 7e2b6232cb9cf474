"""The conventions weights were trained under (`Recipe`). Our weight files hold it as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from model.checked import Checked, at_least


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """The conventions weights were trained under; inference must keep each. Defaults are torchvision's."""

    channel_order: Literal["RGB", "BGR"] = "RGB"
    """Order of the network's input channels."""
    pixel_range: float = 255.0
    """Grey levels are divided by this before mean and deviation are applied."""
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted, in channel_order."""
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divided by, in channel_order."""
    resize: Literal["torchvision", "detectron2"] = "torchvision"
    """Normalise, then float bilinear without antialias to floor(side × scale), then pad with zeros; or grey levels as
    Pillow does it to the nearest side, then normalise and pad."""
    size_divisor: int = 32
    """Padded sides are multiples of this."""
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    """The convolution of a bottleneck that has the stride."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm; torchvision's published v1 weights want 0."""
    anchors_rounded: bool = True
    """Whether anchors at the origin are rounded to whole pixels."""
    anchor_strides: Literal["fitted", "fixed"] = "fitted"
    """Pixels between cells: input side over cells, in whole pixels, or the stride of the level."""
    rpn_delta_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    """Divisors of the RPN's dx, dy, dw, dh."""
    box_delta_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    """Divisors of the box head's dx, dy, dw, dh."""
    max_log_scale: float = math.log(1000 / 16)
    """Upper bound of dw and dh."""
    rpn_pre_nms: int = 1000
    """Anchors kept for each level and image before NMS."""
    rpn_min_side: float = 1e-3
    """Proposals with a side below this are dropped, input pixels."""
    rpn_score_threshold: float = 0.0
    """Proposals scored below this are dropped."""
    rpn_ranking: Literal["probability", "logit"] = "probability"
    """What proposals are ordered by: probabilities, of which those near 1 are equal in float32, or their logits."""
    rpn_nms_threshold: float = 0.7
    """IoU above which a proposal suppresses another of its level."""
    rpn_post_nms: int = 1000
    """Proposals kept for each image."""
    roi_aligned: bool = False
    """Whether RoIAlign shifts by half a cell and takes regions below one cell as they are."""
    roi_sampling_ratio: int = 2
    """Samples along a side of each RoIAlign cell; 0 means as many as the cell is wide."""
    roi_levels: Literal["torchvision", "detectron2"] = "torchvision"
    """Where FPN's eq. 1 is kept from rounding down: 1e-6 added to the level, or 1e-8 to the ratio of sides."""
    score_threshold: float = 0.05
    """Detections must score above this unless the caller says otherwise."""
    box_min_side: float = 1e-2
    """Detections with a side below this are dropped, input pixels."""
    box_nms_threshold: float = 0.5
    """IoU above which a detection suppresses another of its class."""
    max_detections: int = 100
    """Detections kept for each image."""
    mask_threshold: float = 0.5
    """Pixels with at least this probability belong to the mask."""
    paste: Literal["torchvision", "detectron2"] = "torchvision"
    """How a mask's cells are laid over the image's pixels."""
    keypoint_score: Literal["logit", "softmax"] = "logit"
    """A keypoint's score: its logit, or its share of the heatmap."""

    def check(self) -> None:
        for name, length in (("pixel_mean", 3), ("pixel_std", 3), ("rpn_delta_weights", 4), ("box_delta_weights", 4)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} must have {length} values, got {getattr(self, name)}")
        for name in ("pixel_std", "rpn_delta_weights", "box_delta_weights"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        at_least(self, 1, "size_divisor", "rpn_pre_nms", "rpn_post_nms", "max_detections")
        at_least(self, 0, "norm_eps", "rpn_min_side", "box_min_side", "roi_sampling_ratio", "max_log_scale")
        if self.pixel_range <= 0:
            raise ValueError(f"pixel_range must be positive, got {self.pixel_range}")
        thresholds = ("rpn_score_threshold", "rpn_nms_threshold", "score_threshold", "box_nms_threshold")
        for name in thresholds:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.mask_threshold < 1:
            raise ValueError(f"mask_threshold must be above 0 and below 1, got {self.mask_threshold}")

"""What a network is (`ModelConfig`) and by which conventions its weights were trained (`Recipe`).

Both are written into our weight files as JSON, so a field's name is part of the file format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


class _Checked:
    """Reading from JSON and checking of values, for the dataclasses of this file."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            _check_value(f"{type(self).__name__}.{field.name}", getattr(self, field.name), hints[field.name])
        self.check()

    def check(self) -> None:
        """Raise ValueError where a value is out of its bounds."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The dataclass whose `to_json` gave `values`; every field must be there and no other."""
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if names != set(values):
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
            raise ValueError(
                f"{cls.__name__} fields do not match: missing {missing}, unknown {unknown}; "
                "the file was written by another version of maskline, write it again with this one"
            )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """The architecture: which parts, how many, how wide, and the size images are brought to."""

    body: Literal["resnet18", "resnet50"]
    """The convolutional body below the FPN."""
    num_classes: int
    """Outputs of the classifier, background included."""
    fpn_channels: int = 256
    """Width of every pyramid level."""
    fpn_norm: bool = False
    """Whether the pyramid's convolutions are followed by a norm."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Square root of the anchor's area in input pixels, one for each of P2 to P6."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width; every level has one anchor of each in a cell."""
    rpn_convs: int = 1
    """3×3 convolutions before the RPN's two outputs."""
    box_head: Literal["2fc", "4conv1fc"] = "2fc"
    """Layers between the pooled features and the two outputs of the box head."""
    box_head_width: int = 1024
    """Outputs of the box head's linear layers."""
    box_resolution: int = 7
    """Cells along a side of the features pooled for the box head."""
    mask_convs: int = 4
    """3×3 convolutions of the mask head."""
    mask_channels: int = 256
    """Width of the mask head."""
    mask_resolution: int = 14
    """Cells along a side of the features pooled for the mask head; masks have twice as many."""
    head_norm: bool = False
    """Whether the convolutions of box and mask head are followed by a norm."""
    min_size: int = 800
    """Pixels the image's short side is brought to ..."""
    max_size: int = 1333
    """... unless its long side would exceed this."""

    def check(self) -> None:
        _at_least(self, 2, "num_classes")
        widths = ("fpn_channels", "rpn_convs", "box_head_width", "box_resolution", "mask_channels", "mask_resolution")
        _at_least(self, 1, *widths, "min_size")
        _at_least(self, 0, "mask_convs")
        _at_least(self, self.min_size, "max_size")
        if len(self.anchor_sizes) != 5 or min(self.anchor_sizes) < 1:
            raise ValueError(f"anchor_sizes must be 5 positive sizes, for P2 to P6, got {self.anchor_sizes}")
        if not self.aspect_ratios or min(self.aspect_ratios) <= 0:
            raise ValueError(f"aspect_ratios must be positive and at least one, got {self.aspect_ratios}")


def R50_FPN(*, num_classes: int = 91, min_size: int = 800, max_size: int = 1333) -> ModelConfig:  # noqa: N802 - its name
    """Mask R-CNN R-50-FPN as in He et al. 2017 and torchvision's `maskrcnn_resnet50_fpn`."""
    return ModelConfig(body="resnet50", num_classes=num_classes, min_size=min_size, max_size=max_size)


def R18_FPN(*, num_classes: int = 91, min_size: int = 320, max_size: int = 533) -> ModelConfig:  # noqa: N802 - its name
    """A small network for tests and the demonstration: some tens of milliseconds an image on one core."""
    return ModelConfig(
        body="resnet18",
        num_classes=num_classes,
        fpn_channels=128,
        anchor_sizes=(16, 32, 64, 128, 256),
        box_head_width=256,
        mask_channels=128,
        min_size=min_size,
        max_size=max_size,
    )


@dataclass(frozen=True, kw_only=True)
class Recipe(_Checked):
    """The conventions weights were trained under; inference must keep each. Defaults are torchvision's."""

    channel_order: Literal["RGB", "BGR"] = "RGB"
    """Order of the network's input channels."""
    pixel_range: float = 255.0
    """Grey levels are divided by this before mean and deviation are applied."""
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted, in channel_order."""
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divided by, in channel_order."""
    resize: Literal["torchvision"] = "torchvision"
    """Normalise, then float bilinear without antialias to floor(side × scale), then pad with zeros."""
    size_divisor: int = 32
    """Padded sides are multiples of this."""
    bottleneck_stride: Literal["3x3"] = "3x3"
    """The convolution of a bottleneck that has the stride."""
    norm: Literal["frozen", "batch"] = "batch"
    """How norms are computed: a product and a sum, or torch's batch_norm; they differ in the last bit."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm; torchvision's published v1 weights want 0."""
    anchors_rounded: bool = True
    """Whether anchors at the origin are rounded to whole pixels."""
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
    rpn_nms_threshold: float = 0.7
    """IoU above which a proposal suppresses another of its level."""
    rpn_post_nms: int = 1000
    """Proposals kept for each image."""
    roi_aligned: bool = False
    """Whether RoIAlign shifts by half a cell and takes regions below one cell as they are."""
    roi_sampling_ratio: int = 2
    """Samples along a side of each RoIAlign cell; 0 means as many as the cell is wide."""
    background: Literal["first"] = "first"
    """Which class is background."""
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

    def check(self) -> None:
        for name, length in (("pixel_mean", 3), ("pixel_std", 3), ("rpn_delta_weights", 4), ("box_delta_weights", 4)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} must have {length} values, got {getattr(self, name)}")
        for name in ("pixel_std", "rpn_delta_weights", "box_delta_weights"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        _at_least(self, 1, "size_divisor", "rpn_pre_nms", "rpn_post_nms", "max_detections")
        _at_least(self, 0, "norm_eps", "rpn_min_side", "box_min_side", "roi_sampling_ratio", "max_log_scale")
        if self.pixel_range <= 0:
            raise ValueError(f"pixel_range must be positive, got {self.pixel_range}")
        thresholds = ("rpn_score_threshold", "rpn_nms_threshold", "score_threshold", "box_nms_threshold")
        for name in thresholds:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.mask_threshold < 1:
            raise ValueError(f"mask_threshold must be above 0 and below 1, got {self.mask_threshold}")


def _at_least(config: object, bound: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) < bound:
            raise ValueError(f"{name} must be at least {bound}, got {getattr(config, name)}")


def _check_value(name: str, value: object, hint: Any) -> None:
    """Values come from files too: what the annotation says must hold at run time."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
    elif get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name} must be a tuple, got {value!r}")
        for item in value:
            _check_value(f"an item of {name}", item, get_args(hint)[0])
    else:
        kinds = (int, float) if hint is float else (hint,)
        if not isinstance(value, kinds) or (hint is not bool and isinstance(value, bool)):
            raise ValueError(f"{name} must be {hint.__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")

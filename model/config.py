"""What a network is (`ModelConfig`). Our weight files hold it as JSON, so a field's name is part of their format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from model.checked import Checked, at_least

Body = Literal["resnet18", "resnet50", "resnet101", "resnext101_32x8d"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The architecture: which parts, how many, how wide, and the size images are brought to.

    Mask R-CNN (He et al. 2017) and what it grew from: Faster R-CNN has ``mask_head="none"``, Fast R-CNN besides that
    ``proposals="given"``. The ablations of the paper's table 2 are one field each.
    """

    body: Body
    """The convolutional body (He et al. 2015, Xie et al. 2016)."""
    num_classes: int
    """Outputs of the classifier, background included."""
    body_width: int = 64
    """Channels of the stem and of res2's 3×3 convolutions; each later stage has twice as many."""
    neck: Literal["fpn", "c4"] = "fpn"
    """A feature pyramid over all stages, or res4's map alone with res5 as the first part of the region heads."""
    norm: Literal["frozen", "batch", "sync", "group"] = "batch"
    """Of the body, and of pyramid and heads where they have one: batch norm whose statistics and scales are never
    trained, batch norm, batch norm over all workers' images, group norm of 32 groups."""
    fpn_channels: int = 256
    """Width of every pyramid level."""
    fpn_norm: bool = False
    """Whether the pyramid's convolutions are followed by a norm."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Square root of the anchor's area in input pixels: with a pyramid one for each of P2 to P6, else all in a cell."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width; every cell has one anchor of each, of each of its sizes."""
    proposals: Literal["rpn", "given"] = "rpn"
    """Where the regions come from; given ones enter with the images."""
    rpn_convs: int = 1
    """3×3 convolutions before the RPN's two outputs."""
    pooling: Literal["align", "pool"] = "align"
    """How a region's features are taken: RoIAlign, or RoIPool, which rounds to whole cells."""
    box_head: Literal["2fc", "4conv1fc", "res5"] = "2fc"
    """Layers between the pooled features and the two outputs of the box head; res5 is averaged and goes with c4."""
    box_head_width: int = 1024
    """Outputs of the box head's linear layers."""
    box_resolution: int = 7
    """Cells along a side of the features pooled for the box head; res5 halves them."""
    mask_head: Literal["none", "fcn", "mlp"] = "fcn"
    """Convolutions, or linear layers, which know no neighbourhood."""
    mask_classes: Literal["sigmoid", "softmax", "agnostic"] = "sigmoid"
    """A mask for each class, independent of the others; one that competes with the others; one for all classes."""
    mask_convs: int = 4
    """3×3 convolutions of the mask head."""
    mask_channels: int = 256
    """Width of the mask head's convolutions."""
    mask_resolution: int = 14
    """Cells along a side of the features pooled for the mask head."""
    num_keypoints: int = 0
    """Points the keypoint head finds on each object; 0 leaves the head out."""
    keypoint_convs: int = 8
    """3×3 convolutions of the keypoint head."""
    keypoint_channels: int = 512
    """Width of the keypoint head."""
    keypoint_resolution: int = 14
    """Cells along a side of the features pooled for the keypoint head; heatmaps have four times as many."""
    head_norm: bool = False
    """Whether the convolutions of box and mask head are followed by a norm."""
    min_size: int = 800
    """Pixels the image's short side is brought to ..."""
    max_size: int = 1333
    """... unless its long side would exceed this."""
    square: bool = False
    """Whether the input is padded to max_size × max_size, else to the next multiple of the recipe's divisor."""

    def check(self) -> None:
        at_least(self, 2, "num_classes")
        widths = ("body_width", "fpn_channels", "box_head_width", "box_resolution", "mask_channels", "mask_resolution")
        at_least(self, 1, *widths, "rpn_convs", "keypoint_channels", "keypoint_resolution", "min_size")
        at_least(self, 0, "mask_convs", "num_keypoints", "keypoint_convs")
        at_least(self, self.min_size, "max_size")
        if not self.anchor_sizes or min(self.anchor_sizes) < 1:
            raise ValueError(f"anchor_sizes must be positive and at least one, got {self.anchor_sizes}")
        if self.neck == "fpn" and len(self.anchor_sizes) != 5:
            raise ValueError(f"anchor_sizes must be 5 with a pyramid, for P2 to P6, got {self.anchor_sizes}")
        if not self.aspect_ratios or min(self.aspect_ratios) <= 0:
            raise ValueError(f"aspect_ratios must be positive and at least one, got {self.aspect_ratios}")
        if (self.neck == "c4") != (self.box_head == "res5"):
            raise ValueError(f"box_head res5 goes with neck c4 and with no other, got {self.box_head} and {self.neck}")
        if self.neck == "c4" and self.num_keypoints:
            raise ValueError(f"the keypoint head needs neck fpn, got c4 and {self.num_keypoints} keypoints")
        if self.neck == "c4" and self.mask_resolution != self.box_resolution:
            raise ValueError(
                "with neck c4 box and mask head share res5, so mask_resolution must be box_resolution "
                f"{self.box_resolution}, got {self.mask_resolution}"
            )

    @property
    def anchors_per_cell(self) -> int:
        """The RPN's outputs in a cell."""
        return len(self.aspect_ratios) * (1 if self.neck == "fpn" else len(self.anchor_sizes))

    @property
    def mask_side(self) -> int:
        """Cells along a side of a mask as the head gives it."""
        return self.mask_resolution if self.neck == "c4" else 2 * self.mask_resolution


def R50_FPN(*, num_classes: int = 91, min_size: int = 800, max_size: int = 1333) -> ModelConfig:  # noqa: N802 - its name
    """Mask R-CNN R-50-FPN as in He et al. 2017 and torchvision's `maskrcnn_resnet50_fpn`."""
    return ModelConfig(body="resnet50", num_classes=num_classes, min_size=min_size, max_size=max_size)


def R101_FPN(*, num_classes: int = 91) -> ModelConfig:  # noqa: N802 - its name
    """Mask R-CNN R-101-FPN over a square input: short side at least 800 where the long one stays within 1024."""
    return ModelConfig(body="resnet101", num_classes=num_classes, max_size=1024, square=True)


def R50_C4(*, num_classes: int = 91, min_size: int = 800, max_size: int = 1333) -> ModelConfig:  # noqa: N802 - its name
    """Mask R-CNN R-50-C4 as in He et al. 2017: one map at stride 16, res5 run on every region."""
    return ModelConfig(
        body="resnet50",
        num_classes=num_classes,
        neck="c4",
        box_head="res5",
        box_resolution=14,
        mask_convs=0,
        min_size=min_size,
        max_size=max_size,
    )


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


def R18_half_FPN(*, num_classes: int = 91, min_size: int = 320, max_size: int = 533) -> ModelConfig:  # noqa: N802 - its name
    """The same with a body of half the width: 5 million parameters, 10 MB in half precision."""
    return replace(
        R18_FPN(num_classes=num_classes, min_size=min_size, max_size=max_size),
        body_width=32,
        fpn_channels=96,
        fpn_norm=True,
        mask_channels=96,
    )

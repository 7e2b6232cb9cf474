"""Keys and shapes of detectron2's state dicts, as its modules give them (read at 02b5c4e; see the files named below).

A convolution of detectron2 holds its norm: `conv1.weight` and `conv1.norm.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Layout = dict[str, tuple[int, ...]]
Norm = Literal["", "FrozenBN", "SyncBN", "GN"]

DEPTHS = {"R50": (3, 4, 6, 3), "R101": (3, 4, 23, 3), "X101": (3, 4, 23, 3)}
FROZEN = ("weight", "bias", "running_mean", "running_var")


def detectron2_layout(
    body: Literal["R50", "R101", "X101"],
    *,
    neck: Literal["FPN", "C4"] = "FPN",
    heads: Literal["box", "mask", "keypoint"] = "mask",
    num_classes: int = 80,
    large_scale_jitter: bool = False,
) -> Layout:
    """Of a model zoo network; `num_classes` is without background."""
    norm: Norm = "SyncBN" if large_scale_jitter else "FrozenBN"
    if neck == "C4":
        layout = _c4(body, norm)
        width = 2048
    else:
        layout = _fpn(body, norm, large_scale_jitter=large_scale_jitter)
        width = 1024
    predictor = "roi_heads.box_predictor"  # modeling/roi_heads/fast_rcnn.py
    layout |= dict(_affine(f"{predictor}.cls_score", (num_classes + 1, width)))
    layout |= dict(_affine(f"{predictor}.bbox_pred", (4 * num_classes, width)))
    if heads == "mask":
        layout |= _mask_head(neck, num_classes, "SyncBN" if large_scale_jitter else "")
    if heads == "keypoint":
        layout |= _keypoint_head()
    return layout


def old_constants(neck: Literal["FPN", "C4"] = "FPN") -> Layout:
    """What versions before 2021 stored besides."""
    cells = 1 if neck == "C4" else 5
    anchors = {f"proposal_generator.anchor_generator.cell_anchors.{i}": (15 // cells, 4) for i in range(cells)}
    return {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1), **anchors}


def _c4(body: str, norm: Norm) -> Layout:
    """modeling/backbone/resnet.py up to res4; Res5ROIHeads in modeling/roi_heads/roi_heads.py."""
    layout = _resnet("backbone", body, norm, num_stages=3)
    layout |= _rpn(1024, num_anchors=15, num_convs=1)
    return layout | _stage("roi_heads.res5", 3, in_channels=1024, width=512, out_channels=2048, norm=norm)


def _fpn(body: str, norm: Norm, *, large_scale_jitter: bool) -> Layout:
    """modeling/backbone/fpn.py, modeling/roi_heads/box_head.py, configs/new_baselines."""
    fpn_norm: Norm = norm if large_scale_jitter else ""
    layout: Layout = {}
    for stage, channels in ((2, 256), (3, 512), (4, 1024), (5, 2048)):
        layout |= dict(_conv(f"backbone.fpn_lateral{stage}", channels, 256, 1, fpn_norm))
        layout |= dict(_conv(f"backbone.fpn_output{stage}", 256, 256, 3, fpn_norm))
    layout |= _resnet("backbone.bottom_up", body, norm, num_stages=4)
    layout |= _rpn(256, num_anchors=3, num_convs=2 if large_scale_jitter else 1)
    if large_scale_jitter:
        for i in range(1, 5):
            layout |= dict(_conv(f"roi_heads.box_head.conv{i}", 256, 256, 3, norm))
    else:
        layout |= dict(_affine("roi_heads.box_head.fc2", (1024, 1024)))
    return layout | dict(_affine("roi_heads.box_head.fc1", (1024, 256 * 7 * 7)))


def _resnet(prefix: str, body: str, norm: Norm, *, num_stages: int) -> Layout:
    layout = dict(_conv(f"{prefix}.stem.conv1", 3, 64, 7, norm))
    groups, width_per_group = (32, 8) if body == "X101" else (1, 64)
    for i in range(num_stages):
        layout |= _stage(
            f"{prefix}.res{i + 2}",
            DEPTHS[body][i],
            in_channels=64 if i == 0 else 256 * 2 ** (i - 1),
            width=groups * width_per_group * 2**i,
            out_channels=256 * 2**i,
            norm=norm,
            groups=groups,
        )
    return layout


def _stage(
    prefix: str, depth: int, *, in_channels: int, width: int, out_channels: int, norm: Norm, groups: int = 1
) -> Layout:
    layout: Layout = {}
    for block in range(depth):
        name = f"{prefix}.{block}"
        if block == 0:
            layout |= dict(_conv(f"{name}.shortcut", in_channels, out_channels, 1, norm))
        layout |= dict(_conv(f"{name}.conv1", in_channels if block == 0 else out_channels, width, 1, norm))
        layout |= dict(_conv(f"{name}.conv2", width // groups, width, 3, norm))
        layout |= dict(_conv(f"{name}.conv3", width, out_channels, 1, norm))
    return layout


def _rpn(channels: int, *, num_anchors: int, num_convs: int) -> Layout:
    """StandardRPNHead in modeling/proposal_generator/rpn.py; one convolution has no number."""
    head = "proposal_generator.rpn_head"
    names = [f"{head}.conv"] if num_convs == 1 else [f"{head}.conv.conv{i}" for i in range(num_convs)]
    layout: Layout = {}
    for name in names:
        layout |= dict(_conv(name, channels, channels, 3, ""))
    layout |= dict(_conv(f"{head}.objectness_logits", channels, num_anchors, 1, ""))
    return layout | dict(_conv(f"{head}.anchor_deltas", channels, 4 * num_anchors, 1, ""))


def _mask_head(neck: str, num_classes: int, norm: Norm) -> Layout:
    """modeling/roi_heads/mask_head.py; after res5 there are no convolutions before the transposed one."""
    layout: Layout = {}
    for i in range(1, 5 if neck == "FPN" else 1):
        layout |= dict(_conv(f"roi_heads.mask_head.mask_fcn{i}", 256, 256, 3, norm))
    in_channels = 256 if neck == "FPN" else 2048
    layout |= {"roi_heads.mask_head.deconv.weight": (in_channels, 256, 2, 2), "roi_heads.mask_head.deconv.bias": (256,)}
    return layout | dict(_conv("roi_heads.mask_head.predictor", 256, num_classes, 1, ""))


def _keypoint_head() -> Layout:
    """modeling/roi_heads/keypoint_head.py."""
    layout: Layout = {}
    for i in range(1, 9):
        layout |= dict(_conv(f"roi_heads.keypoint_head.conv_fcn{i}", 256 if i == 1 else 512, 512, 3, ""))
    name = "roi_heads.keypoint_head.score_lowres"
    return layout | {f"{name}.weight": (512, 17, 4, 4), f"{name}.bias": (17,)}


def _conv(
    name: str, in_channels: int, out_channels: int, side: int, norm: Norm
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A convolution without a bias where a norm follows."""
    yield f"{name}.weight", (out_channels, in_channels, side, side)
    if norm == "":
        yield f"{name}.bias", (out_channels,)
        return
    for part in FROZEN[:2] if norm == "GN" else FROZEN:
        yield f"{name}.norm.{part}", (out_channels,)
    if norm == "SyncBN":
        yield f"{name}.norm.num_batches_tracked", ()


def _affine(name: str, shape: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]

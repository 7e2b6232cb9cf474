"""Recognising detectron2's R-CNN state dicts by their keys, and bringing them to our names and order of classes.

Read are the model zoo's Mask, Keypoint, Faster and Fast R-CNNs with FPN or C4, and checkpoints of the same networks.
detectron2's background is the last class and has neither boxes nor masks; ours is the first and has both, which nothing
ever looks at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.anchors import anchors_of
from model.config import Body, ModelConfig
from model.recipe import Recipe
from model.resnet import ARCHITECTURES
from model.torchvision_weights import coco_categories

# Ours on the left; detectron2's names follow by applying each row in turn.
_TO_DETECTRON2 = [
    (r"\.(conv\d|shortcut)\.conv\.", r".\1."),
    (r"^body\.stem\.conv\.", "body.stem.conv1."),
    (r"^body\.stem\.norm\.", "body.stem.conv1.norm."),
    (r"^res5\.", "roi_heads.res5."),
    *((rf"^fpn\.(lateral|output)\.{i}\.", rf"backbone.fpn_\g<1>{i + 2}.") for i in range(4)),
    (r"^rpn\.convs\.(\d)\.", r"proposal_generator.rpn_head.conv.conv\1."),
    (r"^rpn\.objectness\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.deltas\.", "proposal_generator.rpn_head.anchor_deltas."),
    *((rf"^box_head\.(conv|fc)s\.{i}\.", rf"roi_heads.box_head.\g<1>{i + 1}.") for i in range(4)),
    (r"^box_head\.class_logits\.", "roi_heads.box_predictor.cls_score."),
    (r"^box_head\.deltas\.", "roi_heads.box_predictor.bbox_pred."),
    *((rf"^mask_head\.convs\.{i}\.", f"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(32)),
    (r"^mask_head\.upsample\.", "roi_heads.mask_head.deconv."),
    (r"^mask_head\.mask_logits\.", "roi_heads.mask_head.predictor."),
    *((rf"^keypoint_head\.convs\.{i}\.", f"roi_heads.keypoint_head.conv_fcn{i + 1}.") for i in range(32)),
    (r"^keypoint_head\.upsample\.", "roi_heads.keypoint_head.score_lowres."),
    (r"^((?:backbone|proposal_generator|roi_heads)\..*)\.conv\.(weight|bias)$", r"\1.\2"),
]

_CELL_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."
"""Constants that older versions stored, as they did pixel_mean and pixel_std."""

_UNSUPPORTED = [
    (r"^head\.", "RetinaNet"),
    (r"^sem_seg_head\.", "Panoptic FPN"),
    (r"^roi_heads\.box_(head|predictor)\.\d\.", "Cascade R-CNN"),
    (r"\.conv2_offset\.", "a body with deformable convolutions"),
    (r"^backbone\.res5\.", "a body with dilated res5 (DC5)"),
]

# In the order the pixels are given, of grey levels from 0 to 255 (configs/common/data/constants.py, defaults.py).
_BGR_MEAN = (103.53, 116.28, 123.675)
_BGR_STD = (57.375, 57.12, 58.395)
_NO_STD = (1.0, 1.0, 1.0)

_ABOVE_ZERO = 2.0**-126
"""The least normal float32: detectron2 drops boxes whose sides are not above 0."""


def is_detectron2(names: Iterable[str]) -> bool:
    """Whether these are the keys of one of detectron2's detectors, be it one that is not supported."""
    return any(name.startswith(("backbone.bottom_up.", "backbone.stem.", "proposal_generator.")) for name in names)


def state_dict(loaded: object) -> dict[str, Tensor] | None:
    """The tensors by name in what a `.pkl` or `.pth` of detectron2 holds; None where that is something else.

    What a checkpoint holds besides the model (optimizer, iteration) is left aside.
    """
    values = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values) or not is_detectron2(values):
        return None
    faults = [name for name, value in values.items() if not isinstance(value, (Tensor, np.ndarray, np.generic))]
    if faults:
        raise ValueError(
            f"the detectron2 weights have {len(faults)} entries that are no arrays (first: {faults[0]}, "
            f"a {type(values[faults[0]]).__name__}); save the network's state_dict() alone"
        )
    return {name: value if isinstance(value, Tensor) else _tensor(value) for name, value in values.items()}


def parameters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those constants and counters that a network of ours does not store."""
    return {
        name: value
        for name, value in tensors.items()
        if name not in ("pixel_mean", "pixel_std")
        and not name.startswith(_CELL_ANCHORS)
        and not name.endswith(".norm.num_batches_tracked")
    }


def recognise(tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, Recipe]:
    """The architecture and conventions of a state dict that `is_detectron2`; keys are not yet checked one by one.

    Raises:
        ValueError: it is of a network we have not, or its constants are others.
    """
    _check_supported(tensors)
    config = _config(tensors)
    recipe = _recipe(tensors, config)
    _check_anchors(tensors, config, recipe)
    return config, recipe


def detectron2_name(name: str, config: ModelConfig) -> str:
    """What detectron2 calls our parameter `name`."""
    for pattern, replacement in _TO_DETECTRON2:
        name = re.sub(pattern, replacement, name)
    if config.rpn_convs == 1:
        name = name.replace(".rpn_head.conv.conv0.", ".rpn_head.conv.")
    return re.sub(r"^body\.", _body_prefix(config), name)


def detectron2_shape(name: str, shape: torch.Size, config: ModelConfig) -> torch.Size:
    """The shape detectron2 gives our parameter `name` of `shape`."""
    return torch.Size([shape[0] - _background_rows(name, config), *shape[1:]]) if shape else shape


def our_tensor(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Our parameter `name` from detectron2's tensor: the background comes first, its boxes and masks are zeros."""
    if name.startswith("box_head.class_logits."):
        return torch.cat([tensor[-1:], tensor[:-1]])
    num_rows = _background_rows(name, config)
    return torch.cat([tensor.new_zeros(num_rows, *tensor.shape[1:]), tensor]) if num_rows else tensor


def categories(config: ModelConfig) -> dict[int, str]:
    """Names of the classes: COCO's 80 in their order, a person where there are keypoints, else numbers."""
    names = [name for _, name in sorted(coco_categories().items()) if name != "N/A"]
    if config.num_classes == len(names) + 1:
        return dict(enumerate(names, start=1))
    if config.num_classes == 2 and config.num_keypoints == 17:
        return {1: "person"}
    return {index: f"class {index}" for index in range(1, config.num_classes)}


def _check_supported(names: Iterable[str]) -> None:
    names = list(names)
    found = [kind for pattern, kind in _UNSUPPORTED if any(re.search(pattern, name) for name in names)]
    if not any(name.startswith("roi_heads.") for name in names):
        found.append("a network without heads for regions")
    if not any(re.match(r"backbone\.(bottom_up\.)?res2\.", name) for name in names):
        found.append("a body that is no ResNet")
    if found:
        raise ValueError(
            f"the detectron2 weights are of {found[0]}, which is not supported; give a Mask, Keypoint, Faster or "
            "Fast R-CNN with R-50, R-101 or X-101-32x8d and FPN, or one with R-50 or R-101 and C4"
        )


def _config(tensors: Mapping[str, Tensor]) -> ModelConfig:
    names = "\n".join(tensors)
    is_c4 = "roi_heads.res5." in names
    num_classes = max(2, _length(tensors, "roi_heads.box_predictor.cls_score.weight", axis=0, default=81))
    mask_outputs = _length(tensors, "roi_heads.mask_head.predictor.weight", axis=0, default=num_classes)
    fpn_norm = re.search(r"^backbone\.fpn_\w+\.norm\.", names, re.MULTILINE) is not None
    config = ModelConfig(
        body=_body(tensors, is_c4=is_c4),
        num_classes=num_classes,
        norm=_norm(names, fpn_norm=fpn_norm),
        fpn_norm=fpn_norm,
        proposals="rpn" if "proposal_generator.rpn_head." in names else "given",
        rpn_convs=1 + _largest(names, r"rpn_head\.conv\.conv(\d+)\.", default=0),
        box_head="4conv1fc" if "roi_heads.box_head.conv" in names else "2fc",
        mask_head="fcn" if "roi_heads.mask_head." in names else "none",
        mask_classes="agnostic" if mask_outputs == 1 and num_classes > 2 else "sigmoid",
        mask_convs=_largest(names, r"mask_head\.mask_fcn(\d+)\.", default=0 if is_c4 else 4),
        num_keypoints=_length(tensors, "roi_heads.keypoint_head.score_lowres.weight", axis=1, default=0),
        keypoint_convs=_largest(names, r"keypoint_head\.conv_fcn(\d+)\.", default=8),
        head_norm=re.search(r"^roi_heads\.(box|mask)_head\.\w+\.norm\.", names, re.MULTILINE) is not None,
    )
    return replace(config, neck="c4", box_head="res5", box_resolution=14) if is_c4 else config


def _norm(names: str, *, fpn_norm: bool) -> Literal["frozen", "sync", "group"]:
    if ".norm.running_mean" not in names:
        return "group"
    return "sync" if fpn_norm or ".norm.num_batches_tracked" in names else "frozen"


def _body(tensors: Mapping[str, Tensor], *, is_c4: bool) -> Body:
    """Which ResNet it is, by its blocks."""
    body = "backbone" if is_c4 else r"backbone\.bottom_up"
    names = "\n".join(tensors)
    starts = [rf"^{body}\.res{stage}" for stage in (2, 3, 4)] + [r"^roi_heads\.res5" if is_c4 else rf"^{body}\.res5"]
    depths = tuple(len(set(re.findall(rf"{start}\.(\d+)\.", names, re.MULTILINE))) for start in starts)
    has_bottlenecks = re.search(rf"{starts[0]}\.\d+\.conv3\.", names, re.MULTILINE) is not None
    bodies = [
        name for name, kind in ARCHITECTURES.items() if (kind.depths, kind.bottleneck) == (depths, has_bottlenecks)
    ]
    if not bodies:
        raise ValueError(
            f"the detectron2 weights have a body of {', '.join(map(str, depths))} blocks; supported are "
            f"{'; '.join(f'{name} with {kind.depths}' for name, kind in ARCHITECTURES.items())}"
        )
    width = _length(tensors, f"backbone.{'' if is_c4 else 'bottom_up.'}res2.0.conv2.weight", axis=0, default=0)
    widths = {ARCHITECTURES[name].inner_channels[0]: name for name in bodies}
    return widths.get(width, bodies[0])  # of another width, or without one: the check will name what does not fit


def _recipe(tensors: Mapping[str, Tensor], config: ModelConfig) -> Recipe:
    is_resnext = config.body == "resnext101_32x8d"
    mean = _pixel_constant(tensors, "pixel_mean") or _BGR_MEAN
    std = _pixel_constant(tensors, "pixel_std") or (_BGR_STD if is_resnext else _NO_STD)
    if config.fpn_norm and config.rpn_convs == 1 and "pixel_std" not in tensors:
        raise ValueError(
            "the detectron2 weights have norms in the pyramid and one convolution in the RPN; such networks were "
            "trained both with and without pixel_std, and the file does not say which; add the pixel_std of its "
            "config to the state dict, shape (3, 1, 1)"
        )
    # MSRA's ResNets have the stride in the first 1x1 and the deviation in their first weights; so do those trained
    # from nothing without a deviation (LSJ). FAIR's ResNeXt and group norm ResNet, and torchvision's, have neither.
    msras = std == _NO_STD and not is_resnext and config.norm != "group"
    is_c4 = config.neck == "c4"
    return Recipe(
        channel_order="RGB" if mean[0] > mean[2] else "BGR",  # ImageNet's red is brighter than its blue
        pixel_range=1.0,
        pixel_mean=mean,
        pixel_std=std,
        resize="detectron2",
        size_divisor=1 if is_c4 else 32,
        bottleneck_stride="1x1" if msras else "3x3",
        anchors_rounded=False,
        anchor_strides="fixed",
        rpn_pre_nms=6000 if is_c4 else 1000,
        rpn_min_side=_ABOVE_ZERO,
        rpn_ranking="logit",
        roi_aligned=True,
        roi_sampling_ratio=0,
        roi_levels="detectron2",
        box_min_side=_ABOVE_ZERO,
        paste="detectron2",
        keypoint_score="softmax",
    )


def _check_anchors(tensors: Mapping[str, Tensor], config: ModelConfig, recipe: Recipe) -> None:
    expected = {f"{_CELL_ANCHORS}{level}": cell for level, cell in enumerate(anchors_of(config, recipe))}
    for name in (name for name in tensors if name.startswith(_CELL_ANCHORS)):
        found, cell = tensors[name].float(), expected.get(name)
        if cell is None or found.shape != cell.shape or not torch.allclose(found, cell, atol=1e-3):
            raise ValueError(
                f"the detectron2 weights have other anchors than the model zoo's: {name} is "
                f"{found.flatten()[:4].tolist()} and on, of shape {tuple(found.shape)}; this is not supported"
            )


def _pixel_constant(tensors: Mapping[str, Tensor], name: str) -> tuple[float, ...] | None:
    if name not in tensors:
        return None
    values = tensors[name].flatten().float().numpy()
    if len(values) != 3 or not np.isfinite(values).all() or (name == "pixel_std" and values.min() <= 0):
        raise ValueError(f"{name} of the detectron2 weights must be 3 numbers, deviations positive, got {values[:4]}")
    return tuple(float(str(value)) for value in values)  # 103.53, not the float32 next to it


def _tensor(value: NDArray[Any] | np.generic) -> Tensor:
    array = np.asarray(value)
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "u" else array)


def _body_prefix(config: ModelConfig) -> str:
    return "backbone." if config.neck == "c4" else "backbone.bottom_up."


def _background_rows(name: str, config: ModelConfig) -> int:
    """Rows of our parameter that detectron2's has not."""
    if name.startswith("mask_head.mask_logits.") and config.mask_classes != "agnostic":
        return 1
    return 4 if name.startswith("box_head.deltas.") else 0


def _length(tensors: Mapping[str, Tensor], name: str, *, axis: int, default: int) -> int:
    tensor = tensors.get(name)
    return default if tensor is None or tensor.dim() <= axis else tensor.shape[axis]


def _largest(names: str, pattern: str, *, default: int) -> int:
    """The largest of the numbers in the names."""
    return max((int(number) for number in re.findall(pattern, names)), default=default)

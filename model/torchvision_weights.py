"""Recognising torchvision's R-CNN and ResNet state dicts by their keys, and putting our names on them.

Both of torchvision's key styles are read: the one it writes now and the one of its first published file (2019).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from model.config import Body, ModelConfig
from model.network import Network
from model.recipe import Recipe
from model.resnet import ARCHITECTURES

# Ours on the left; torchvision's names follow by applying the first row that matches, then the rest of the list.
_TO_TORCHVISION = [
    (r"^res5\.", "backbone.body.layer4."),
    (r"^body\.stem\.conv\.", "backbone.body.conv1."),
    (r"^body\.stem\.norm\.", "backbone.body.bn1."),
    (r"^body\.res2\.", "backbone.body.layer1."),
    (r"^body\.res3\.", "backbone.body.layer2."),
    (r"^body\.res4\.", "backbone.body.layer3."),
    (r"^body\.res5\.", "backbone.body.layer4."),
    (r"\.conv(\d)\.conv\.", r".conv\1."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.conv\.", ".downsample.0."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"^fpn\.lateral\.(\d)\.", r"backbone.fpn.inner_blocks.\1."),
    (r"^fpn\.output\.(\d)\.", r"backbone.fpn.layer_blocks.\1."),
    (r"^rpn\.convs\.", "rpn.head.conv."),
    (r"^rpn\.objectness\.", "rpn.head.cls_logits."),
    (r"^rpn\.deltas\.", "rpn.head.bbox_pred."),
    (r"^box_head\.convs\.", "roi_heads.box_head."),
    (r"^box_head\.class_logits\.", "roi_heads.box_predictor.cls_score."),
    (r"^box_head\.deltas\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^mask_head\.convs\.", "roi_heads.mask_head."),
    (r"^mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^mask_head\.mask_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
    *((rf"^keypoint_head\.convs\.{i}\.conv\.", f"roi_heads.keypoint_head.{2 * i}.") for i in range(32)),
    (r"^keypoint_head\.upsample\.", "roi_heads.keypoint_predictor.kps_score_lowres."),
    (r"(inner_blocks|layer_blocks|head\.conv|box_head|mask_head)\.(\d)\.conv\.", r"\1.\2.0."),
    (r"(inner_blocks|layer_blocks|box_head|mask_head)\.(\d)\.norm\.", r"\1.\2.1."),
]
_V1_LINEAR = [(r"^box_head\.fcs\.0\.", "roi_heads.box_head.fc6."), (r"^box_head\.fcs\.1\.", "roi_heads.box_head.fc7.")]
_V2_LINEAR = [(r"^box_head\.fcs\.0\.", "roi_heads.box_head.5.")]

# The names of 2019 on the left.
_FROM_FIRST_STYLE = [
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    *((rf"^roi_heads\.mask_head\.mask_fcn{i + 1}\.", f"roi_heads.mask_head.{i}.0.") for i in range(4)),
]

# Tensors whose shapes tell the architecture.
_CLASS_LOGITS = "roi_heads.box_predictor.cls_score.weight"
_KEYPOINTS = "roi_heads.keypoint_predictor.kps_score_lowres.weight"


def is_torchvision(names: Iterable[str]) -> bool:
    """Whether these are the keys of one of torchvision's R-CNNs."""
    prefixes = ("backbone.", "rpn.head.", "roi_heads.")
    names = list(names)
    return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names torchvision gives them now, its counters of batches left out."""
    return {
        _rename(name, _FROM_FIRST_STYLE): value
        for name, value in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }


def recognise(tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, Recipe]:
    """The architecture and conventions of a state dict that `is_torchvision`; keys are not yet checked one by one."""
    # A frozen norm counts no batches. torchvision's published v1 weights were trained with an eps of 0 in theirs, and
    # what is tuned from them keeps it; BatchNorm2d has the default.
    counts_batches = any(name.endswith(".num_batches_tracked") for name in tensors)
    is_v2 = "roi_heads.box_head.5.weight" in tensors
    config = ModelConfig(
        body=_body(tensors, "backbone.body."),
        num_classes=max(2, _length(tensors, _CLASS_LOGITS, axis=0, default=91)),
        norm="batch" if counts_batches or is_v2 else "frozen",
        mask_head="fcn" if any(name.startswith("roi_heads.mask_") for name in tensors) else "none",
        num_keypoints=_length(tensors, _KEYPOINTS, axis=1, default=0),
    )
    if is_v2:
        config = replace(config, fpn_norm=True, rpn_convs=2, box_head="4conv1fc", head_norm=True)
    return config, Recipe() if counts_batches or is_v2 else Recipe(norm_eps=0.0)


def body_tensors(tensors: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    """The parameters of the network's body, and of its res5, from one of torchvision's ImageNet ResNets.

    Raises:
        ValueError: the ResNet is another one.
    """
    wanted = {name: value for name, value in network.tensors().items() if name.startswith(("body.", "res5."))}
    theirs = {name: _rename(name, _TO_TORCHVISION).removeprefix("backbone.body.") for name in wanted}
    unused = {name for name in tensors if not name.endswith(".num_batches_tracked")} - set(theirs.values())
    faults = [f"{name} is missing" for name in theirs.values() if name not in tensors]
    faults += [f"{name} is unexpected" for name in sorted(unused) if not name.startswith("fc.")]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(wanted[ours].shape)}"
        for ours, name in theirs.items()
        if name in tensors and tensors[name].shape != wanted[ours].shape
    ]
    if faults:
        raise ValueError(f"the weights of the body do not fit in {len(faults)} places, first: {faults[0]}")
    return {ours: tensors[name].float() for ours, name in theirs.items()}


def _body(tensors: Mapping[str, Tensor], prefix: str) -> Body:
    """Which ResNet it is, by its blocks."""
    depths = tuple(
        len({name.split(".")[3] for name in tensors if name.startswith(f"{prefix}layer{stage}.")})
        for stage in range(1, 5)
    )
    has_bottlenecks = f"{prefix}layer1.0.conv3.weight" in tensors
    width = _length(tensors, f"{prefix}layer1.0.conv2.weight", axis=0, default=0)
    for name, architecture in ARCHITECTURES.items():
        if (architecture.depths, architecture.bottleneck, architecture.inner_channels[0]) == (
            depths,
            has_bottlenecks,
            width,
        ):
            return name
    return "resnet50"  # whose keys the check will name as missing


def _length(tensors: Mapping[str, Tensor], name: str, *, axis: int, default: int) -> int:
    tensor = tensors.get(name)
    return default if tensor is None or tensor.dim() <= axis else tensor.shape[axis]


def torchvision_name(name: str, config: ModelConfig) -> str:
    """What torchvision calls our parameter `name`."""
    return _rename(name, [*(_V1_LINEAR if config.box_head == "2fc" else _V2_LINEAR), *_TO_TORCHVISION])


def categories(config: ModelConfig) -> dict[int, str]:
    """Names of the classes: COCO's where there are as many, a person where there are keypoints, else numbers."""
    if config.num_classes == 91:
        return coco_categories()
    if config.num_classes == 2 and config.num_keypoints == 17:
        return {1: "person"}
    return {index: f"class {index}" for index in range(1, config.num_classes)}


def coco_categories() -> dict[int, str]:
    """COCO's 90 ids and names as torchvision's weights carry them, background left out."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

    names = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return {index: name for index, name in enumerate(names) if index > 0}


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name

"""Recognising torchvision's Mask R-CNN state dicts by their keys, and putting our names on them.

Both of torchvision's key styles are read: the one it writes now and the one of its first published file (2019).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from model.config import R50_FPN, ModelConfig, Recipe

# Ours on the left; torchvision's names follow by applying the first row that matches, then the rest of the list.
_TO_TORCHVISION = [
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

_CLASS_WEIGHT = "roi_heads.box_predictor.cls_score.weight"


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
    weight = tensors.get(_CLASS_WEIGHT)
    config = R50_FPN(num_classes=91 if weight is None or weight.dim() == 0 else len(weight))
    # A frozen norm counts no batches. torchvision's published v1 weights were trained with an eps of 0 in theirs, and
    # what is tuned from them keeps it; BatchNorm2d has the default.
    counts_batches = any(name.endswith(".num_batches_tracked") for name in tensors)
    recipe = Recipe() if counts_batches else Recipe(norm="frozen", norm_eps=0.0)
    if "roi_heads.box_head.5.weight" in tensors:
        config = replace(config, fpn_norm=True, rpn_convs=2, box_head="4conv1fc", head_norm=True)
        recipe = Recipe()
    return config, recipe


def torchvision_name(name: str, config: ModelConfig) -> str:
    """What torchvision calls our parameter `name`."""
    return _rename(name, [*(_V1_LINEAR if config.box_head == "2fc" else _V2_LINEAR), *_TO_TORCHVISION])


def coco_categories() -> dict[int, str]:
    """COCO's 91 ids and names as torchvision's weights carry them, background left out."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

    names = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return {index: name for index, name in enumerate(names) if index > 0}


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name

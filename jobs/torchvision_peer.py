"""The peer of ``maskline benchmark``'s model part, and what tests agree with: torchvision's own networks.

Their seeded random weights are spread so that every image has detections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from jobs.stage_times import Telling, hooked
from model import Detections, ImageSize, Rle, random_weights
from model.stages import AfterStage, Stage

Output = dict[str, Tensor]
Pixels = NDArray[np.uint8]

MAX_COMPILED = 64
"""Input sizes that one network is compiled for."""

_NORM_RANGES = [("weight", 0.7, 1.1), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2), ("running_var", 0.8, 1.2)]
_LEVEL_STDS = (1.0, 1.25, 1.5, 2.0)
"""Of the features p2 to p5, which share the RPN: p2 has most of the anchors and would have all the proposals."""


def torchvision_network(
    version: str,
    image: NDArray[np.uint8],
    *,
    seed: int = 0,
    num_classes: int = 91,
    min_size: int = 800,
    max_size: int = 1333,
    proposals: int = 1000,
) -> nn.Module:
    """maskrcnn_resnet50_fpn ("v1", frozen norms with an eps of 0, as published; "v1-batch-norm") or "v2"; Faster R-CNN
    ("faster v1", "faster v2"), or "keypoint" of 17 points, as published like v1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"min_size": min_size, "max_size": max_size, "rpn_post_nms_top_n_test": proposals}
        network = _build(version, num_classes=num_classes, **sizes)
        _vary_norms(network)
    network.eval()
    _spread(network, image)
    return network


@torch.inference_mode()
def predict(network: nn.Module, image: NDArray[np.uint8]) -> Output:
    """torchvision's answer for one image; of a keypoint network also its `heatmaps` (D, K, S, S) and the boxes in the
    input that they lie over, `input_boxes` (D, 4)."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    heads: Any = network.roi_heads
    kept: Output = {}
    if heads.keypoint_predictor is None:
        output: Output = network([pixels])[0]
        return output
    handles = [
        heads.keypoint_predictor.register_forward_hook(lambda _module, _in, maps: kept.update(heatmaps=maps)),
        heads.keypoint_roi_pool.register_forward_pre_hook(lambda _module, given: kept.update(input_boxes=given[1][0])),
    ]
    output = network([pixels])[0]
    for handle in handles:
        handle.remove()
    return {**output, **kept}


def predict_batches(
    network: nn.Module, device: torch.device, *, autocast: bool = False
) -> Callable[[Sequence[Sequence[Pixels]]], list[Detections]]:
    """Its forward with its paste, then run lengths by pycocotools."""

    @torch.inference_mode()
    def of_batch(batch: Sequence[Pixels]) -> list[Detections]:
        pixels = [torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255 for image in batch]
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            outputs = network(pixels)
        return [_encoded(output, ImageSize(*image.shape[:2])) for output, image in zip(outputs, batch, strict=True)]

    def detect(batches: Sequence[Sequence[Pixels]]) -> list[Detections]:
        return [found for batch in batches for found in of_batch(batch)]

    return detect


def telling(network: Any) -> Telling:
    """Its stages; resizing boxes back and pasting are the last."""

    def tell(after: AfterStage) -> AbstractContextManager[None]:
        heads = network.roi_heads
        ends: dict[nn.Module, Stage] = {
            network.transform: "resize and normalise",
            network.backbone: "body and pyramid",
            network.rpn.head: "RPN head",
            network.rpn: "proposals",
            heads.box_roi_pool: "RoIAlign for boxes",
            heads.box_predictor: "box head",
            heads.mask_roi_pool: "RoIAlign for masks",
            heads.mask_predictor: "mask head",
        }
        return hooked(after, ends=ends, begins={heads.mask_roi_pool: "detections"})

    return tell


def _encoded(output: dict[str, torch.Tensor], size: ImageSize) -> Detections:
    bitmaps = (output["masks"][:, 0] >= 0.5).to(torch.uint8).cpu().numpy()  # (D, H, W)
    masks: list[Rle] = coco_mask.encode(np.asfortranarray(bitmaps.transpose(1, 2, 0)))
    labels = output["labels"].cpu().numpy()
    return Detections(
        size=size,
        boxes=output["boxes"].float().cpu().numpy(),
        scores=output["scores"].float().cpu().numpy(),
        category_ids=labels,
        categories=[str(label) for label in labels],
        masks=masks,
        areas=coco_mask.area(masks).astype(np.int64),
    )


def compiled(network: nn.Module) -> nn.Module:
    """With its body and pyramid compiled for each input size; what follows has shapes that hang on the data."""
    copied: Any = copy.copy(network)
    copied._modules = dict(network._modules)
    copied.backbone = torch.compile(copied.backbone, dynamic=False)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED)
    return copied  # type: ignore[no-any-return]


def _build(version: str, **sizes: int) -> nn.Module:
    from torchvision.models import detection, resnet50
    from torchvision.models.detection._utils import overwrite_eps
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    as_published = {"v1": detection.MaskRCNN, "faster v1": detection.FasterRCNN, "keypoint": detection.KeypointRCNN}
    if version in as_published:
        body = resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
        network: nn.Module = as_published[version](_resnet_fpn_extractor(body, 3), **sizes)
        overwrite_eps(network, 0.0)
        return network
    make = {
        "v1-batch-norm": detection.maskrcnn_resnet50_fpn,
        "v2": detection.maskrcnn_resnet50_fpn_v2,
        "faster v2": detection.fasterrcnn_resnet50_fpn_v2,
    }[version]
    network = make(weights=None, weights_backbone=None, **sizes)
    return network


def _vary_norms(network: nn.Module) -> None:
    """Norms that change nothing would hide a wrong folding."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d):
            for name, low, high in _NORM_RANGES:
                getattr(module, name).data.uniform_(low, high)


def _spread(network: nn.Module, image: NDArray[np.uint8]) -> None:
    there = dict(network.named_modules())
    outputs = [there[f"backbone.fpn.layer_blocks.{level}"] for level in range(len(_LEVEL_STDS))]
    layers = [
        [("rpn.head.cls_logits", random_weights.OBJECTNESS_STD), ("rpn.head.bbox_pred", random_weights.RPN_DELTAS_STD)],
        [
            ("roi_heads.box_predictor.cls_score", random_weights.CLASS_LOGITS_STD),
            ("roi_heads.box_predictor.bbox_pred", random_weights.BOX_DELTAS_STD),
        ],
        [("roi_heads.mask_predictor.mask_fcn_logits", random_weights.MASK_LOGITS_STD)],
        [("roi_heads.keypoint_predictor.kps_score_lowres", random_weights.HEATMAPS_STD)],
    ]
    steps = [[(there[name], target) for name, target in step if name in there] for step in layers]
    # the last of a block is its convolution, or the norm behind it
    steps.insert(0, [(list(block.children())[-1], std) for block, std in zip(outputs, _LEVEL_STDS, strict=True)])
    for step in steps:
        random_weights.rescale_outputs([step], lambda: predict(network, image))
        if there["roi_heads.box_predictor.cls_score"] in dict(step):
            _centre(network, there["roi_heads.box_predictor.cls_score"], image)


def _centre(network: nn.Module, layer: nn.Module, image: NDArray[np.uint8]) -> None:
    """Give each output a mean of 0 over the regions, or all of them are of one class."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    predict(network, image)
    handle.remove()
    layer.get_parameter("bias").data.sub_(outputs[0].mean(dim=0))

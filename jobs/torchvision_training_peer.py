"""The peer of ``maskline train``: torchvision's Mask R-CNN with torchvision's losses, in our loop, on our batches.

It has the shape our config asks for and starts from our body's weights, the rest as torchvision initialises it. Its
bodies are its own, but of half the width, which it has none of: then it has ours, which agrees with its ResNets to the
last bit (tests).
"""

# N images, G objects of an image, C pyramid channels.

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchvision
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from jobs.train_config import TrainConfig
from jobs.trainee import Trainee
from model import Detections, ImageSize, MaskRCNN, ModelConfig, Recipe
from model.ground_truth import TrainingBatch
from model.losses import LossConfig
from model.mask_targets import PackedMasks
from model.norm import norm_of
from model.resnet import ARCHITECTURES
from model.structures import Rle
from model.torchvision_weights import torchvision_name
from pipeline.errors import ConfigError
from pipeline.training_evaluation import Predict
from pipeline.worker_group import WorkerGroup

_LOSS_NAMES = {
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


def torchvision_trainee(start: MaskRCNN, config: TrainConfig, group: WorkerGroup, device: torch.device) -> Trainee:
    """torchvision's network of the starting one's config; each worker's losses are means over its own images."""
    if config.precision == "fp64":
        raise ConfigError("the torchvision peer trains in fp32 or bf16, not in fp64")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = _build(start, config.losses).to(device)

    def detecting(network: nn.Module) -> Predict:
        def predict(images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
            return [_predict(network, image, start, device) for image in images]

        return predict

    return Trainee(network=network, forward=_Losses(network), predictor=detecting, to_bytes=_to_bytes)


class _Losses(nn.Module):
    """TrainingBatch in, losses under our names out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        assert batch.masks is not None
        bitmaps = batch.masks.bitmaps if isinstance(batch.masks, PackedMasks) else batch.masks
        sizes = [(int(height), int(width)) for height, width in batch.image_sizes.tolist()]
        targets = [
            {"boxes": boxes[valid], "labels": labels[valid], "masks": masks}
            for boxes, labels, valid, masks in zip(
                batch.gt_boxes, batch.gt_labels, batch.gt_valid, bitmaps, strict=True
            )
        ]
        network: Any = self.network
        network.train()
        features = network.backbone(batch.pixels)
        images = ImageList(batch.pixels, sizes)
        proposals, rpn_losses = network.rpn(images, features, targets)
        _, losses = network.roi_heads(features, proposals, sizes, targets)
        return {_LOSS_NAMES[name]: loss for name, loss in {**rpn_losses, **losses}.items()}


class _Backbone(nn.Module):
    """A body that gives its maps as a list, under torchvision's pyramid."""

    def __init__(self, body: nn.Module, in_channels: Sequence[int], out_channels: int, *, fpn_norm: bool) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            list(in_channels),
            out_channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d if fpn_norm else None,
        )
        self.out_channels = out_channels

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps = self.body(pixels)
        pyramid: dict[str, Tensor] = self.fpn(OrderedDict((str(level), one) for level, one in enumerate(maps)))
        return pyramid


def _build(start: MaskRCNN, losses: LossConfig) -> nn.Module:
    config, recipe = start.config, start.recipe
    if config.neck != "fpn" or config.mask_head != "fcn" or config.box_head != "2fc" or config.num_keypoints:
        raise ConfigError("the torchvision peer has the pyramid, two linear layers and convolutional masks only")
    channels = config.fpn_channels
    network: nn.Module = detection.MaskRCNN(
        _Backbone(_body(start), start.network.body.out_channels, channels, fpn_norm=config.fpn_norm),
        min_size=config.min_size,
        max_size=config.max_size,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), (config.aspect_ratios,) * len(config.anchor_sizes)
        ),
        box_roi_pool=_pooler(config, recipe, config.box_resolution),
        box_head=TwoMLPHead(channels * config.box_resolution**2, config.box_head_width),
        box_predictor=FastRCNNPredictor(config.box_head_width, config.num_classes),
        mask_roi_pool=_pooler(config, recipe, config.mask_resolution),
        mask_head=MaskRCNNHeads(channels, (config.mask_channels,) * config.mask_convs, 1),
        mask_predictor=MaskRCNNPredictor(config.mask_channels, config.mask_channels, config.num_classes),
        rpn_pre_nms_top_n_train=losses.rpn_pre_nms,
        rpn_post_nms_top_n_train=losses.rpn_post_nms,
        rpn_batch_size_per_image=losses.rpn_samples,
        rpn_positive_fraction=losses.rpn_positive_fraction,
        rpn_fg_iou_thresh=losses.rpn_positive_iou,
        rpn_bg_iou_thresh=losses.rpn_negative_iou,
        box_fg_iou_thresh=losses.box_positive_iou,
        box_bg_iou_thresh=losses.box_positive_iou,
        box_batch_size_per_image=losses.box_samples,
        box_positive_fraction=losses.box_positive_fraction,
        box_detections_per_img=recipe.max_detections,
    )
    return network


class _OwnBody(nn.Module):
    """torchvision's ResNet, which gives its maps by name."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.stages = IntermediateLayerGetter(resnet, {f"layer{index}": str(index) for index in range(1, 5)})

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(self.stages(pixels).values())


def _body(start: MaskRCNN) -> nn.Module:
    """torchvision's own, with the weights of ours, where it has one."""
    config, ours = start.config, start.network.body
    if config.body_width != ARCHITECTURES[config.body].width or start.recipe.bottleneck_stride != "3x3":
        return ours
    resnet: nn.Module = torchvision.models.get_model(config.body, weights=None, norm_layer=_norm(start))
    theirs = {
        torchvision_name(f"body.{name}", config).removeprefix("backbone.body."): value
        for name, value in ours.state_dict().items()
    }
    left = resnet.load_state_dict(theirs, strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith("fc.") for name in left.missing_keys)
    return _OwnBody(resnet)


def _norm(start: MaskRCNN) -> Callable[[int], nn.Module]:
    if start.config.norm == "frozen":
        return partial(FrozenBatchNorm2d, eps=start.recipe.norm_eps)
    return norm_of(start.config.norm, start.recipe.norm_eps)


def _pooler(config: ModelConfig, recipe: Recipe, resolution: int) -> nn.Module:
    """torchvision's own convention of RoIAlign, the only one its pooler has."""
    pooler: nn.Module = MultiScaleRoIAlign(["0", "1", "2", "3"], resolution, max(1, recipe.roi_sampling_ratio))
    return pooler


@torch.inference_mode()
def _predict(network: nn.Module, image: NDArray[np.uint8], start: MaskRCNN, device: torch.device) -> Detections:
    network.eval()
    found = network([torch.from_numpy(image).permute(2, 0, 1).to(device).float() / 255])[0]
    found = {name: values.cpu() for name, values in found.items()}
    bitmaps = (found["masks"][:, 0] >= start.recipe.mask_threshold).numpy().astype(np.uint8)  # (D, H, W)
    rles: list[Rle] = coco_mask.encode(np.asfortranarray(bitmaps.transpose(1, 2, 0)))
    labels = found["labels"].numpy()
    return Detections(
        size=ImageSize(*image.shape[:2]),
        boxes=found["boxes"].numpy(),
        scores=found["scores"].numpy(),
        category_ids=labels,
        categories=[start.categories[label] for label in labels.tolist()],
        masks=rles,
        areas=bitmaps.sum(axis=(1, 2), dtype=np.int64),
    )


def _to_bytes(network: nn.Module) -> bytes:
    """Its tensors under torchvision's names."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    return bytes(safetensors.torch.save(tensors))

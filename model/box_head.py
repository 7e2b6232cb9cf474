"""Box head (Girshick 2015): pooled features enter, classes and boxes leave; then the choice of detections."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import linear

from model import boxes as box_math
from model.conv_norm import ConvNorm, adds_by_kernel, to_layer
from model.fused_conv import fused_linear, linear_in_float32
from model.nms import segment_nms
from model.norm import Norm
from model.recipe import Recipe
from model.rpn import Proposals

# N images, P proposals and D detections of an image, R = N P regions, K classes with background, S pooled side.


class BoxHead(nn.Module):
    """Convolutions and linear layers, then class logits and the box deltas of every class.

    Without linear layers the mean of the cells takes their place, as after res5.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        resolution: int,
        num_convs: int,
        num_fcs: int,
        width: int,
        num_classes: int,
        norm: Norm | None,
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(ConvNorm(in_channels, in_channels, kernel_size=3, norm=norm) for _ in range(num_convs))
        )
        self.in_channels = in_channels
        self.resolution = resolution
        sizes = [in_channels * resolution**2] + [width] * num_fcs if num_fcs else [in_channels]
        self.fcs = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))
        self.class_logits = nn.Linear(sizes[-1], num_classes)
        self.deltas = nn.Linear(sizes[-1], num_classes * 4)
        self.fused = False
        """Whether what follows a product runs with it, as in a fused ConvNorm."""

    def forward(self, region_features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convs(region_features)  # (R, C, S, S)
        for fc in self.fcs:
            if self.fused:
                assert isinstance(fc, nn.Conv2d | nn.Linear)
                assert fc.bias is not None
                x = fused_linear(_cells_first(x), _cells_first(fc.weight), fc.bias)
            elif isinstance(fc, nn.Linear) and x.dim() == 4 and adds_by_kernel(x):
                # The weight is the smaller one to bring into the other's order.
                x = linear(_cells_first(x), _cells_first(fc.weight.view(-1, *x.shape[1:])), fc.bias).relu_()
            else:
                x = x if isinstance(fc, nn.Conv2d) else x.flatten(1)
                x = fc(to_layer(x, fc)).relu_()
        x = x.flatten(1) if self.fcs else x.mean(dim=(2, 3))  # (R, width)
        if self.fused:
            class_logits, deltas = (
                linear_in_float32(x, layer.weight, layer.bias) for layer in (self.class_logits, self.deltas)
            )
            return class_logits, deltas.view(*class_logits.shape, 4)
        x = x.to(self.class_logits.weight.dtype)
        return self.class_logits(x), self.deltas(x).view(len(x), self.class_logits.out_features, 4)  # (R, K), (R, K, 4)


def _cells_first(values: Tensor) -> Tensor:
    """(R, S S C) of channels-last (R, C, S, S), which has them in this order; what is flat stays."""
    return values if values.dim() == 2 else values.permute(0, 2, 3, 1).flatten(1)


def first_layer_as_convolution(head: BoxHead) -> None:
    """Let a convolution over the whole of the pooled features be the first linear layer.

    That needs no copy from channels-last, and on a CPU it is the faster matrix product.
    """
    if not head.fcs:
        return
    linear = head.fcs[0]
    assert isinstance(linear, nn.Linear)
    conv = nn.Conv2d(head.in_channels, linear.out_features, head.resolution, device="meta")
    conv.weight = nn.Parameter(linear.weight.view(-1, head.in_channels, head.resolution, head.resolution))
    conv.bias = linear.bias
    head.fcs[0] = conv


class Chosen(NamedTuple):
    """D places for each image, best first; the empty ones hold zeros."""

    boxes: Tensor
    """(N, D, 4) in the padded input's frame."""
    scores: Tensor
    """(N, D)."""
    labels: Tensor
    """(N, D) class indices."""
    valid: Tensor
    """(N, D) whether the place is filled."""


def choose(
    class_logits: Tensor,
    deltas: Tensor,
    proposals: Proposals,
    *,
    image_sizes: Tensor,
    score_threshold: float,
    recipe: Recipe,
) -> Chosen:
    """The best detections of each image from the head's outputs for its proposals."""
    num_images, num_places = proposals.valid.shape
    num_classes = class_logits.shape[1]
    scores = class_logits.softmax(dim=1)[:, 1:]  # (R, K - 1), the background left out
    wanted = (scores > score_threshold) & proposals.valid.view(-1, 1)
    region, label = wanted.nonzero(as_tuple=True)  # (B,), (B,)
    scores, label = scores[region, label], label + 1
    image_index = region.div(num_places, rounding_mode="floor")

    boxes = box_math.decode(
        deltas[region, label],
        proposals.boxes.view(-1, 4)[region],
        weights=recipe.box_delta_weights,
        max_log_scale=recipe.max_log_scale,
    )  # (B, 4)
    boxes = box_math.clip(boxes, image_sizes[image_index])
    usable = box_math.wide_enough(boxes, recipe.box_min_side)
    boxes, scores, label, image_index = boxes[usable], scores[usable], label[usable], image_index[usable]

    kept = segment_nms(boxes, scores, image_index * num_classes + label, recipe.box_nms_threshold)
    boxes, scores, label, image_index = boxes[kept], scores[kept], label[kept], image_index[kept]
    position, valid = box_math.first_of_each_image(image_index, num_images=num_images, limit=recipe.max_detections)
    if len(kept) == 0:
        return Chosen(boxes.new_zeros(*position.shape, 4), scores.new_zeros(position.shape), position, valid)
    return Chosen(boxes[position] * valid[..., None], scores[position] * valid, label[position] * valid, valid)

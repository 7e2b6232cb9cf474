"""The training forward: a batch with its ground truth enters, the losses leave (He et al. 2017 section 3).

L = L_rpn_objectness + L_rpn_box + L_class + L_box + L_mask + L_keypoint, those of the parts the network has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.anchors import anchors_at, anchors_of, cell_strides
from model.boxes import first_marked
from model.config import ModelConfig
from model.conv_norm import ConvNorm
from model.fixed_shapes import propose_fixed
from model.ground_truth import TrainingBatch
from model.kernels import run_kernels_on
from model.keypoint_targets import heatmap_targets
from model.losses import (
    IGNORED,
    Divisor,
    LossConfig,
    box_losses,
    keypoint_loss,
    mask_loss,
    own_count,
    rpn_losses,
    softmax_mask_loss,
)
from model.mask_targets import crop_of_images
from model.matcher import NEITHER, Matches, ignore_crowd, match, take
from model.network import Network
from model.pooling import image_of_place, pool_regions, to_be_pooled
from model.recipe import Recipe
from model.rpn import Proposals, RPNHead, propose
from model.sampler import Sampler, random_sampler
from model.structures import ImageSize
from model.transfers import HostCopy

# N images, B anchors, P proposals and G ground truth boxes of an image, R regions trained on over the batch.

_REGIONS_STEP = 64
"""A GPU's libraries choose kernels anew for each number of masks that they have not seen, which takes milliseconds."""


class _Regions(NamedTuple):
    """What the heads are trained on, image after image."""

    boxes: Tensor
    """(R, 4)."""
    image_index: Tensor
    """(R,)."""
    gt_index: Tensor
    """(R,) place among the image's ground truth."""
    labels: Tensor
    """(R,) 0 for background, -1 for places that hold no region."""

    def only(self, wanted: Tensor) -> _Regions:
        return _Regions(*(values[wanted] for values in self))


class TrainingForward(nn.Module):
    """A network and the rules by which its losses are computed; what DDP wraps."""

    def __init__(
        self,
        network: Network,
        *,
        config: ModelConfig,
        recipe: Recipe,
        losses: LossConfig | None = None,
        rpn_sampler: Sampler | None = None,
        box_sampler: Sampler | None = None,
        divisor: Divisor = own_count,
        exact: bool = False,
    ) -> None:
        """Samplers are random unless given. With a `divisor` that gives the mean of all workers' counts, the mean of
        their losses is the loss of all their images together. `exact` keeps torchvision's order of sums in RoIAlign and
        in all convolutions but the RPN's, which takes longer on a CPU."""
        super().__init__()
        self.network = network
        self.config = config
        self.recipe = recipe
        self.losses = losses = losses or LossConfig()
        self.rpn_sampler = rpn_sampler or random_sampler(
            count=losses.rpn_samples, positive_fraction=losses.rpn_positive_fraction
        )
        self.box_sampler = box_sampler or random_sampler(
            count=losses.box_samples, positive_fraction=losses.box_positive_fraction
        )
        self.divisor = divisor
        self.exact = exact
        for part in network.modules():
            if isinstance(part, ConvNorm):
                part.trains_by_winograd = not exact
        self._proposing = replace(recipe, rpn_pre_nms=losses.rpn_pre_nms, rpn_post_nms=losses.rpn_post_nms)
        self._cells = anchors_of(config, recipe)
        """On the device of the batch before."""

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The losses by name, each a scalar; their sum is what is minimised."""
        levels = to_be_pooled(self.network.features(batch.pixels), self.network.strides)
        losses: dict[str, Tensor] = {}
        proposals = self._propose(levels, batch)
        regions = self._sample(proposals, batch)
        num_positives = HostCopy((regions.labels > 0).sum())
        if self.network.rpn is not None:
            losses["rpn_objectness"], losses["rpn_box"] = self._rpn_losses(self.network.rpn, levels, batch)
        features = self._features(levels, regions, self.config.box_resolution)
        class_logits, deltas = self.network.box_head(features)
        gt_boxes = batch.gt_boxes[regions.image_index, regions.gt_index] if batch.gt_boxes.shape[1] else regions.boxes
        losses["class"], losses["box"] = box_losses(
            class_logits,
            deltas,
            regions.labels,
            regions.boxes,
            gt_boxes,
            config=self.losses,
            delta_weights=self.recipe.box_delta_weights,
            divisor=self.divisor,
        )
        # Waited for here, behind work that a GPU has still to do.
        positive = first_marked((regions.labels > 0)[None], limit=int(num_positives.wait())).position[0]
        positives = regions.only(positive)
        if self.network.mask_head is not None:
            # res5 has run on these regions already; a pyramid's are pooled anew, finer
            shared = features[positive] if self.network.res5 is not None else None
            losses["mask"] = self._mask_loss(levels, positives, shared, batch)
        if self.network.keypoint_head is not None:
            losses["keypoint"] = self._keypoint_loss(levels, positives, batch)
        return losses

    @torch.no_grad()
    def _propose(self, levels: Sequence[Tensor], batch: TrainingBatch) -> Proposals:
        """To train the heads on."""
        if self.network.rpn is None:
            assert batch.proposals is not None
            assert batch.proposals_valid is not None
            return Proposals(batch.proposals, batch.proposals_valid)
        grids, strides = self._grids(levels, batch)
        outputs = [self.network.rpn(level) for level in levels]
        torch.clear_autocast_cache()  # in older releases of torch it keeps weights without a gradient
        return _propose_on(batch.pixels.device)(
            outputs,
            self._cells,
            grids=grids,
            strides=strides,
            image_sizes=batch.image_sizes,
            recipe=self._proposing,
        )

    def _rpn_losses(self, rpn: RPNHead, levels: Sequence[Tensor], batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        device = batch.pixels.device
        grids, strides = self._grids(levels, batch)
        anchors = torch.cat(
            [
                anchors_at(
                    torch.arange(grid.height * grid.width * len(cell), device=device), cell, grid=grid, stride=stride
                )
                for cell, grid, stride in zip(self._cells, grids, strides, strict=True)
            ]
        )  # (B, 4)
        config = self.losses
        thresholds = (config.rpn_positive_iou, config.rpn_negative_iou)
        matches = self._match(anchors, batch, thresholds, allow_low_quality=True)
        chosen = self.rpn_sampler(matches.label, batch.seeds)
        return rpn_losses(
            *rpn.of_anchors(levels, chosen.position),
            anchors,
            matches,
            chosen,
            batch.gt_boxes,
            config=config,
            delta_weights=self.recipe.rpn_delta_weights,
            divisor=self.divisor,
        )

    def _grids(self, levels: Sequence[Tensor], batch: TrainingBatch) -> tuple[list[ImageSize], list[ImageSize]]:
        """Cells of each level and pixels between them, whose anchors are now on the batch's device."""
        self._cells = [cell.to(batch.pixels.device) for cell in self._cells]
        grids = [ImageSize(*level.shape[-2:]) for level in levels]
        return grids, cell_strides(ImageSize(*batch.pixels.shape[-2:]), grids, rule=self.recipe.anchor_strides)

    def _match(
        self, boxes: Tensor, batch: TrainingBatch, thresholds: tuple[float, float], *, allow_low_quality: bool
    ) -> Matches:
        """What each box learns, from the IoUs where positive begins and negative ends; crowds count for neither."""
        positive_iou, negative_iou = thresholds
        matches = match(
            boxes,
            batch.gt_boxes,
            batch.gt_valid,
            positive_iou=positive_iou,
            negative_iou=negative_iou,
            allow_low_quality=allow_low_quality,
        )
        threshold = self.losses.crowd_overlap
        label = ignore_crowd(matches.label, boxes, batch.crowd_boxes, batch.crowd_valid, threshold=threshold)
        return matches._replace(label=label)

    @torch.no_grad()
    def _sample(self, proposals: Proposals, batch: TrainingBatch) -> _Regions:
        """Regions for the heads, from the proposals and the ground truth boxes themselves."""
        boxes = torch.cat([proposals.boxes, batch.gt_boxes], dim=1)  # (N, P + G, 4)
        valid = torch.cat([proposals.valid, batch.gt_valid], dim=1)  # (N, P + G)
        thresholds = (self.losses.box_positive_iou, self.losses.box_positive_iou)
        matches = self._match(boxes, batch, thresholds, allow_low_quality=False)
        label = matches.label.masked_fill(~valid, NEITHER)  # (N, P + G)
        position, filled = self.box_sampler(label, batch.seeds)  # (N, S)
        gt_index = matches.gt_index.gather(1, position)  # (N, S)
        gt_labels = take(batch.gt_labels, gt_index).where(label.gather(1, position) > 0, 0)
        regions = _Regions(
            take(boxes, position).flatten(0, 1),
            image_of_place(filled),
            gt_index.flatten(),
            gt_labels.where(filled, IGNORED).flatten(),
        )
        if run_kernels_on(boxes.device) and self.network.res5 is None and not self.config.head_norm:
            return regions
        # The empty places cost a CPU time, and norms would count them.
        return regions.only((regions.labels != IGNORED).nonzero()[:, 0])

    def _mask_loss(
        self, levels: Sequence[Tensor], regions: _Regions, features: Tensor | None, batch: TrainingBatch
    ) -> Tensor:
        head = self.network.mask_head
        assert head is not None
        assert batch.masks is not None
        num_regions = len(regions.labels)
        if features is None:
            if not self.config.head_norm:  # which they would count in
                regions = _filled_up(regions)
            features = self._features(levels, regions, self.config.mask_resolution)
        targets = crop_of_images(
            batch.masks,
            regions.image_index[:num_regions],
            regions.gt_index[:num_regions],
            regions.boxes[:num_regions],
            side=self.config.mask_side,
            target=self.losses.mask_target,
        )
        if self.config.mask_classes == "softmax":
            logits, labels = head.all_logits(features)[:num_regions], regions.labels[:num_regions]
            return softmax_mask_loss(logits, labels, targets, divisor=self.divisor)
        return mask_loss(head(features, regions.labels)[:num_regions], targets, divisor=self.divisor)

    def _keypoint_loss(self, levels: Sequence[Tensor], regions: _Regions, batch: TrainingBatch) -> Tensor:
        head = self.network.keypoint_head
        assert head is not None
        assert batch.keypoints is not None
        heatmaps: Tensor = head(self._features(levels, regions, self.config.keypoint_resolution))  # (R, K, S, S)
        keypoints = batch.keypoints.new_zeros(0, self.config.num_keypoints, 3)
        if batch.keypoints.shape[1] > 0:
            keypoints = batch.keypoints[regions.image_index, regions.gt_index]  # (R, K, 3)
        index, valid = heatmap_targets(keypoints, regions.boxes, side=heatmaps.shape[-1])
        return keypoint_loss(
            heatmaps, index, valid, num_images=len(batch.pixels), config=self.losses, divisor=self.divisor
        )

    def _features(self, levels: Sequence[Tensor], regions: _Regions, resolution: int) -> Tensor:
        pooled: Tensor = pool_regions(
            levels,
            self.network.strides,
            regions.boxes,
            regions.image_index,
            resolution=resolution,
            config=self.config,
            recipe=self.recipe,
            exact=self.exact,
        )
        return self.network.of_regions(pooled)


def _filled_up(regions: _Regions) -> _Regions:
    """On a GPU the first region over and over behind the others, to a multiple of `_REGIONS_STEP`."""
    num_regions = len(regions.labels)
    if not run_kernels_on(regions.labels.device) or num_regions % _REGIONS_STEP == 0:
        return regions
    place = torch.arange(-(-num_regions // _REGIONS_STEP) * _REGIONS_STEP, device=regions.labels.device)
    return regions.only(place.where(place < num_regions, 0))


def _propose_on(device: torch.device) -> Callable[..., Proposals]:
    """`rpn.propose`, or on a GPU what does not wait for it."""
    if not run_kernels_on(device):
        return propose
    from model.kernels.nms import sorted_nms

    return partial(propose_fixed, nms=sorted_nms)

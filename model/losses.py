"""The losses of training and what they are computed from (Girshick 2015, Ren et al. 2015, He et al. 2017).

Outputs of the heads and padded ground truth enter; scalars leave, in float32, zero for no regions. Formulas and
defaults are torchvision's; where detectron2 differs, `LossConfig` chooses.
"""

# N images, B anchors of an image, P of them sampled, G places for ground truth, R regions over the batch, K classes
# with background or keypoints, M mask side, S heatmap side.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.boxes import Places, encode, full_precision
from model.checked import Checked, at_least
from model.mask_targets import MaskTarget
from model.matcher import POSITIVE, Matches, take

Divisor = Callable[[Tensor], Tensor]
"""From how many terms a loss has on this worker to what their sum is divided by, which is never 0."""

IGNORED = -1
"""The class of what is not trained on."""


@dataclass(frozen=True, kw_only=True)
class LossConfig(Checked):
    """What the network is trained towards. Defaults are torchvision's."""

    rpn_positive_iou: float = 0.7
    """IoU with a ground truth box from which an anchor is positive."""
    rpn_negative_iou: float = 0.3
    """IoU below which an anchor is negative; between the two it is not trained on."""
    rpn_samples: int = 256
    """Anchors of an image trained on."""
    rpn_positive_fraction: float = 0.5
    """At most this share of them is positive."""
    rpn_pre_nms: int = 2000
    """Anchors kept for each level and image before NMS, while training."""
    rpn_post_nms: int = 2000
    """Proposals kept for each image, while training; detectron2 keeps 1000."""
    box_positive_iou: float = 0.5
    """IoU with a ground truth box from which a proposal is positive; below it is negative."""
    box_samples: int = 512
    """Proposals of an image trained on."""
    box_positive_fraction: float = 0.25
    """At most this share of them is positive."""
    crowd_overlap: float = 0.7
    """Negatives with at least this share of their area in a crowd region are not trained on: the first Detectron's
    CROWD_FILTER_THRESH. torchvision and detectron2 drop crowd regions instead, and what lies in them is negative."""
    rpn_beta: float = 1 / 9
    """Where the RPN's box loss turns from quadratic to linear; 0, detectron2's, is plain L1."""
    box_beta: float = 1 / 9
    """The same for the box head."""
    rpn_normaliser: Literal["sampled", "fixed"] = "sampled"
    """What the RPN's losses are divided by: the anchors sampled, or, as in detectron2, rpn_samples for each image."""
    mask_target: MaskTarget = "soft"
    """How ground truth masks are brought to the cells of the mask head."""
    keypoint_normaliser: Literal["visible", "fixed"] = "visible"
    """What the keypoint loss is divided by: the keypoints to be learnt, or, as one choice of detectron2 is, all that
    the most positives of each image could have."""

    def check(self) -> None:
        at_least(self, 1, "rpn_samples", "rpn_pre_nms", "rpn_post_nms", "box_samples")
        at_least(self, 0, "rpn_beta", "box_beta")
        shares = ("rpn_positive_iou", "rpn_positive_fraction", "box_positive_iou", "box_positive_fraction")
        for name in (*shares, "crowd_overlap"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if not 0 <= self.rpn_negative_iou <= self.rpn_positive_iou:
            raise ValueError(
                f"rpn_negative_iou must be between 0 and rpn_positive_iou {self.rpn_positive_iou}, "
                f"got {self.rpn_negative_iou}"
            )


def own_count(count: Tensor) -> Tensor:
    """The divisor where there is one worker: each loss is a mean over its terms."""
    return count.clamp(min=1)


def smooth_l1(values: Tensor, targets: Tensor, beta: float) -> Tensor:
    """(...) of each difference d: d² / 2 beta below beta, |d| - beta / 2 above (Girshick 2015 eq. 3, beta 1)."""
    return F.smooth_l1_loss(full_precision(values), full_precision(targets), reduction="none", beta=beta)


def rpn_losses(
    objectness: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    matches: Matches,
    chosen: Places,
    gt_boxes: Tensor,
    *,
    config: LossConfig,
    delta_weights: Sequence[float],
    divisor: Divisor = own_count,
) -> tuple[Tensor, Tensor]:
    """Losses of objectness (N, P) and of deltas (N, P, 4) of the `chosen` (N, P) of the anchors (B, 4), which `matches`
    are of too; ground truth boxes are (N, G, 4)."""
    position, counted = chosen  # (N, P)
    is_positive = (matches.label.gather(1, position) == POSITIVE) & counted
    logits = full_precision(objectness)
    objectness_loss = F.binary_cross_entropy_with_logits(logits, is_positive.to(logits.dtype), reduction="none")
    regressed = is_positive[..., None]  # (N, P, 1)
    gt_boxes = take(gt_boxes, matches.gt_index.gather(1, position))  # (N, P, 4)
    targets = _delta_targets(anchors[position], gt_boxes, regressed, delta_weights)  # (N, P, 4)
    box_loss = smooth_l1(deltas, targets, config.rpn_beta)
    fixed = config.rpn_normaliser == "fixed"
    num_samples = divisor(_number(config.rpn_samples * len(position), position.device) if fixed else counted.sum())
    return _sum(objectness_loss, counted) / num_samples, _sum(box_loss, regressed) / num_samples


def box_losses(
    class_logits: Tensor,
    deltas: Tensor,
    labels: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    *,
    config: LossConfig,
    delta_weights: Sequence[float],
    divisor: Divisor = own_count,
) -> tuple[Tensor, Tensor]:
    """Losses of class logits (R, K) and of deltas (R, K, 4), of which only those of the label count.

    `labels` (R,) are 0 for background and -1 for places that hold no region; `gt_boxes` (R, 4) are those that `boxes`
    (R, 4) are matched to and matter for positives only.
    """
    num_regions = divisor((labels != IGNORED).sum())
    class_loss = F.cross_entropy(full_precision(class_logits), labels, ignore_index=IGNORED, reduction="sum")
    regressed = (labels > 0)[:, None]  # (R, 1)
    own = labels.clamp(min=0)[:, None, None].expand(-1, 1, 4)
    own_deltas = deltas.gather(1, own)[:, 0]  # (R, 4)
    targets = _delta_targets(boxes, gt_boxes, regressed, delta_weights)  # (R, 4)
    box_loss = smooth_l1(own_deltas, targets, config.box_beta)
    return class_loss / num_regions, _sum(box_loss, regressed) / num_regions


def mask_loss(logits: Tensor, targets: Tensor, *, divisor: Divisor = own_count) -> Tensor:
    """Mean binary cross entropy of the logits (R, M, M) of each region's own class (He et al. 2017 section 3)."""
    logits = full_precision(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return loss / _num_cells(targets, divisor)


def softmax_mask_loss(logits: Tensor, labels: Tensor, targets: Tensor, *, divisor: Divisor = own_count) -> Tensor:
    """Mean cross entropy of logits (R, K, M, M) whose K classes compete in each cell (He et al. 2017 table 2b).

    A cell of `targets` (R, M, M) that is set is of the region's label, another is background, class 0; one in between
    is shared by both.
    """
    log_scores = full_precision(logits).log_softmax(dim=1)  # (R, K, M, M)
    own = log_scores.gather(1, labels[:, None, None, None].expand(-1, 1, *logits.shape[2:]))[:, 0]  # (R, M, M)
    targets = targets.to(log_scores.dtype)
    return -(targets * own + (1 - targets) * log_scores[:, 0]).sum() / _num_cells(targets, divisor)


def keypoint_loss(
    heatmaps: Tensor,
    index: Tensor,
    valid: Tensor,
    *,
    num_images: int,
    config: LossConfig,
    divisor: Divisor = own_count,
) -> Tensor:
    """Mean cross entropy over the S × S cells of each of the heatmaps (R, K, S, S) whose keypoint is `valid` (R, K);
    `index` (R, K) is its cell."""
    cells = full_precision(heatmaps).flatten(0, 1).flatten(1)  # (R K, S S)
    loss = F.cross_entropy(cells, index.where(valid, IGNORED).flatten(), ignore_index=IGNORED, reduction="sum")
    if config.keypoint_normaliser == "visible":
        return loss / divisor(valid.sum())
    most = num_images * heatmaps.shape[1] * config.box_samples * config.box_positive_fraction
    return loss / divisor(_number(most, heatmaps.device))


@torch.no_grad()
def _delta_targets(boxes: Tensor, gt_boxes: Tensor, regressed: Tensor, weights: Sequence[float]) -> Tensor:
    """Zeros where not `regressed`: there a box may have no sides, and even a NaN that is cut out has NaN gradients."""
    return encode(boxes, gt_boxes, weights=weights).where(regressed, 0.0)


def _num_cells(targets: Tensor, divisor: Divisor) -> Tensor:
    """Of (R, M, M), with what the divisor makes of R."""
    return divisor(_number(len(targets), targets.device)) * targets.shape[1:].numel()


def _number(value: float, device: torch.device) -> Tensor:
    """Made there, as a copy would wait for all that is under way."""
    return torch.full((), value, dtype=torch.float32, device=device)


def _sum(losses: Tensor, counted: Tensor) -> Tensor:
    return losses.where(counted, 0.0).sum()

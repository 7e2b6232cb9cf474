"""Proposals and detections in tensors of fixed shapes: what can be captured in a CUDA graph.

The same choices as in `rpn.propose` and `box_head.choose`, which gather what passes a threshold and so have shapes that
hang on the data. Here every candidate keeps a place and a mark says whether it counts.
"""

# N images, L levels, k anchors of a level, K classes with background; P proposals, C candidates and D detections of an
# image.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model import boxes as box_math
from model.anchors import anchors_at
from model.box_head import Chosen
from model.recipe import Recipe
from model.rpn import Proposals
from model.structures import ImageSize

MAX_CANDIDATES = 4096
"""Of an image, that go into the choice of detections: the best scored. More are looked at only where it matters."""


class SortedNms(Protocol):
    """`model.kernels.nms.sorted_nms`."""

    def __call__(
        self,
        boxes: Tensor,
        valid: Tensor,
        iou_threshold: float,
        *,
        labels: Tensor | None = None,
        limit: int | None = None,
    ) -> Tensor:
        """(S, B) which boxes stay of S segments of B places, each best first."""


class FixedChoice(NamedTuple):
    """The detections, and whether they are certain."""

    chosen: Chosen
    uncertain: Tensor
    """(N,) whether candidates were left out and too few detections found, so that one of those might be missing."""


def propose_fixed(
    outputs: Sequence[tuple[Tensor, Tensor]],
    cells: Sequence[Tensor],
    *,
    grids: Sequence[ImageSize],
    strides: Sequence[ImageSize],
    image_sizes: Tensor,
    recipe: Recipe,
    nms: SortedNms,
) -> Proposals:
    """`rpn.propose`, but that equal scores may come in another order."""
    num_images = len(image_sizes)
    widest = max(min(recipe.rpn_pre_nms, objectness.shape[1]) for objectness, _ in outputs)
    of_levels: list[tuple[Tensor, Tensor, Tensor]] = []
    for (objectness, all_deltas), cell, grid, stride in zip(outputs, cells, grids, strides, strict=True):
        logits, index = objectness.topk(min(widest, objectness.shape[1]), dim=1)  # (N, k)
        anchors = anchors_at(index, cell, grid=grid, stride=stride)  # (N, k, 4)
        deltas = all_deltas.gather(1, index[..., None].expand(-1, -1, 4))  # (N, k, 4)
        missing = widest - logits.shape[1]
        of_levels.append(
            (
                F.pad(logits, (0, missing), value=-torch.inf),
                F.pad(anchors, (0, 0, 0, missing)),
                F.pad(deltas, (0, 0, 0, missing)),
            )
        )
    logits, anchors, deltas = (torch.stack(parts, dim=1) for parts in zip(*of_levels, strict=True))  # (N, L, k, …)
    boxes = box_math.decode(deltas, anchors, weights=recipe.rpn_delta_weights, max_log_scale=recipe.max_log_scale)
    boxes = box_math.clip(boxes, image_sizes[:, None, None])  # (N, L, k, 4)
    scores = logits.sigmoid()
    usable = (
        box_math.wide_enough(boxes, recipe.rpn_min_side) & (scores >= recipe.rpn_score_threshold) & logits.isfinite()
    )
    kept = nms(boxes.flatten(0, 1), usable.flatten(0, 1), recipe.rpn_nms_threshold)  # (N L, k)
    ranking = logits if recipe.rpn_ranking == "logit" else scores
    ranking = ranking.flatten(1).masked_fill(~kept.view(num_images, -1), -torch.inf)  # (N, L k)
    order = ranking.argsort(dim=1, descending=True, stable=True)
    places = F.pad(order[:, : recipe.rpn_post_nms], (0, max(0, recipe.rpn_post_nms - order.shape[1])))  # (N, P)
    ranks = torch.arange(recipe.rpn_post_nms, device=order.device)
    valid = ranks < kept.view(num_images, -1).sum(dim=1, keepdim=True)  # (N, P)
    return Proposals(_gather(boxes.flatten(1, 2), places) * valid[..., None], valid)


def choose_fixed(
    class_logits: Tensor,
    deltas: Tensor,
    proposals: Proposals,
    *,
    image_sizes: Tensor,
    score_threshold: Tensor,
    recipe: Recipe,
    nms: SortedNms,
    max_candidates: int = MAX_CANDIDATES,
) -> FixedChoice:
    """`box_head.choose`, from the best `max_candidates` candidates of each image; `score_threshold` is a scalar.

    Suppression goes from the best score down, so candidates that were left out can only follow the detections found:
    where those fill all places they are the same.
    """
    num_images, num_places = proposals.valid.shape
    num_labels = class_logits.shape[1] - 1  # without the background
    scores = class_logits.softmax(dim=1)[:, 1:].reshape(num_images, num_places, num_labels)
    wanted = (scores > score_threshold) & proposals.valid[..., None]
    num_wanted = wanted.flatten(1).sum(dim=1)  # (N,)
    num_candidates = min(max_candidates, num_places * num_labels)
    scores, index = scores.masked_fill(~wanted, -1.0).flatten(1).topk(num_candidates, dim=1)  # (N, C)
    region, label = index.div(num_labels, rounding_mode="floor"), index.remainder(num_labels) + 1
    boxes = box_math.decode(
        _gather(deltas.view(num_images, -1, 4), region * (num_labels + 1) + label),
        _gather(proposals.boxes, region),
        weights=recipe.box_delta_weights,
        max_log_scale=recipe.max_log_scale,
    )
    boxes = box_math.clip(boxes, image_sizes[:, None])  # (N, C, 4)
    usable = (scores > score_threshold) & box_math.wide_enough(boxes, recipe.box_min_side)
    limit = recipe.max_detections
    kept = nms(boxes, usable, recipe.box_nms_threshold, labels=label, limit=limit)  # (N, C)
    places, valid = box_math.first_marked(kept, limit=limit)  # (N, D), (N, D)
    chosen = Chosen(
        _gather(boxes, places) * valid[..., None],
        scores.gather(1, places) * valid,
        label.gather(1, places) * valid,
        valid,
    )
    return FixedChoice(chosen, (num_wanted > num_candidates) & ~valid[:, -1])


def _gather(boxes: Tensor, index: Tensor) -> Tensor:
    """(N, X, 4) of (N, B, 4) those at (N, X)."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))

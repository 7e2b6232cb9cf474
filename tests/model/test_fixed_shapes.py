"""Choices in fixed shapes against those in shapes that hang on the data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import Recipe
from model.anchors import cell_anchors
from model.box_head import choose
from model.fixed_shapes import choose_fixed, propose_fixed
from model.nms import segment_nms
from model.rpn import Proposals, propose
from model.structures import ImageSize

GRIDS = [ImageSize(12, 16), ImageSize(6, 8), ImageSize(2, 3)]
STRIDES = [ImageSize(8, 8), ImageSize(16, 16), ImageSize(48, 42)]


def sorted_nms(
    boxes: Tensor, valid: Tensor, iou_threshold: float, *, labels: Tensor | None = None, limit: int | None = None
) -> Tensor:
    """By the NMS of shapes that hang on the data."""
    kept = torch.zeros_like(valid)
    for segment in range(len(boxes)):
        (place,) = valid[segment].nonzero(as_tuple=True)
        segments = torch.zeros_like(place) if labels is None else labels[segment, place]
        ranks = -torch.arange(len(place), dtype=torch.float32)
        chosen = segment_nms(boxes[segment, place], ranks, segments, iou_threshold)
        kept[segment, place[chosen[:limit]]] = True
    return kept


def random_outputs(seed: int, num_images: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    counts = [grid.height * grid.width * 3 for grid in GRIDS]
    return [
        (
            torch.randn(num_images, count, generator=random) * 3,
            torch.randn(num_images, count, 4, generator=random) * 0.4,
        )
        for count in counts
    ]


@given(seed=st.integers(0, 2**32), pre=st.sampled_from([5, 40, 1000]), post=st.sampled_from([1, 30, 500]))
@settings(deadline=None, max_examples=25)
def test_proposals_are_those_of_data_dependent_shapes(seed: int, pre: int, post: int) -> None:
    recipe = replace(Recipe(), rpn_pre_nms=pre, rpn_post_nms=post, rpn_score_threshold=0.3 * (seed % 2))
    make = partial(
        propose,
        random_outputs(seed, 2),
        [cell_anchors(size, (0.5, 1.0, 2.0), rounded=True) for size in (16, 32, 64)],
        grids=GRIDS,
        strides=STRIDES,
        image_sizes=torch.tensor([[96.0, 128.0], [70.0, 100.0]]),
        recipe=recipe,
    )
    expected = make()
    found = propose_fixed(*make.args, **make.keywords, nms=sorted_nms)
    assert torch.equal(found.valid, expected.valid)
    assert torch.equal(found.boxes, expected.boxes)


def random_regions(seed: int, num_places: int, num_classes: int) -> tuple[Tensor, Tensor, Proposals]:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, num_places, 2, generator=random) * 80
    boxes = torch.cat([corner, corner + torch.rand(2, num_places, 2, generator=random) * 40], dim=2)
    valid = torch.rand(2, num_places, generator=random) < 0.8
    logits = torch.randn(2 * num_places, num_classes, generator=random) * 2
    deltas = torch.randn(2 * num_places, num_classes, 4, generator=random)
    return logits, deltas, Proposals(boxes * valid[..., None], valid)


@given(
    seed=st.integers(0, 2**32),
    num_places=st.sampled_from([1, 20, 60]),
    num_classes=st.sampled_from([2, 6]),
    threshold=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    limit=st.sampled_from([1, 10, 100]),
    max_candidates=st.sampled_from([3, 40, 4096]),
)
@settings(deadline=None, max_examples=60)
def test_detections_are_those_of_data_dependent_shapes(
    seed: int, num_places: int, num_classes: int, threshold: float, limit: int, max_candidates: int
) -> None:
    logits, deltas, proposals = random_regions(seed, num_places, num_classes)
    recipe = replace(Recipe(), max_detections=limit)
    sizes = torch.tensor([[96.0, 128.0], [70.0, 100.0]])
    expected = choose(logits, deltas, proposals, image_sizes=sizes, score_threshold=threshold, recipe=recipe)
    found, uncertain = choose_fixed(
        logits,
        deltas,
        proposals,
        image_sizes=sizes,
        score_threshold=torch.tensor(threshold),
        recipe=recipe,
        nms=sorted_nms,
        max_candidates=max_candidates,
    )
    for image in range(2):
        wanted = (logits.view(2, num_places, -1)[image].softmax(dim=1)[:, 1:] > threshold).sum(dim=1)
        num_wanted = int(wanted[proposals.valid[image]].sum())
        assert uncertain[image] == (num_wanted > max_candidates and int(found.valid[image].sum()) < limit)
        if uncertain[image]:
            continue
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[image], other[image])


def test_candidates_left_out_matter_only_where_places_stay_empty() -> None:
    # Three boxes apart, one class: of two candidates two are found, and a third would have been.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]])
    proposals = Proposals(boxes, torch.ones(1, 3, dtype=torch.bool))
    logits = torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])

    def uncertain(limit: int) -> bool:
        return bool(
            choose_fixed(
                logits,
                torch.zeros(3, 2, 4),
                proposals,
                image_sizes=torch.tensor([[60.0, 60.0]]),
                score_threshold=torch.tensor(0.05),
                recipe=replace(Recipe(), max_detections=limit),
                nms=sorted_nms,
                max_candidates=2,
            ).uncertain
        )

    assert not uncertain(limit=2)
    assert uncertain(limit=3)


@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_nothing_found_leaves_every_place_empty(threshold: float) -> None:
    logits, deltas, proposals = random_regions(0, 5, 3)
    nowhere = proposals._replace(valid=torch.zeros_like(proposals.valid))
    found, uncertain = choose_fixed(
        logits,
        deltas,
        nowhere,
        image_sizes=torch.tensor([[96.0, 128.0]] * 2),
        score_threshold=torch.tensor(threshold),
        recipe=Recipe(),
        nms=sorted_nms,
    )
    assert not uncertain.any()
    assert not any(values.any() for values in found)

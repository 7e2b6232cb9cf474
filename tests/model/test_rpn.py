from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.anchors import cell_strides
from model.recipe import Recipe
from model.rpn import Proposals, RPNHead, propose
from model.structures import ImageSize

INPUT = ImageSize(64, 64)
SIZES = torch.tensor([[60.0, 50.0]])
CELL = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
NONE = torch.zeros(4)


def _propose(
    levels: Sequence[tuple[list[list[float]], Tensor | None]],
    *,
    cells: Sequence[Tensor] | None = None,
    sizes: Tensor = SIZES,
    recipe: Recipe | None = None,
) -> Proposals:
    """Objectness of each level of a square grid with one anchor in a cell, and its deltas, none if None."""
    outputs, grids = [], []
    for objectness, deltas in levels:
        logits = torch.tensor(objectness)
        outputs.append((logits, torch.zeros(*logits.shape, 4) if deltas is None else deltas))
        side = int(logits.shape[1] ** 0.5)
        grids.append(ImageSize(side, side))
    return propose(
        outputs,
        cells or [CELL] * len(levels),
        grids=grids,
        strides=cell_strides(INPUT, grids, rule="fitted"),
        image_sizes=sizes,
        recipe=recipe or Recipe(),
    )


def test_proposals_are_anchors_clipped_and_best_first() -> None:
    # 2 × 2 cells 32 px apart; the image ends at x 50, y 60
    found = _propose([([[0.0, 3.0, 1.0, 2.0]], None)])
    assert found.valid[0].tolist() == [True] * 4 + [False] * 996
    expected = [[24.0, 0.0, 40.0, 8.0], [24.0, 24.0, 40.0, 40.0], [0.0, 24.0, 8.0, 40.0], [0.0, 0.0, 8.0, 8.0]]
    assert found.boxes[0, :4].tolist() == expected
    assert not found.boxes[0, 4:].any()


def test_overlap_suppresses_within_a_level_only() -> None:
    wide = torch.tensor([[-8.0, -8.0, 8.0, 8.0], [-8.0, -8.0, 8.0, 8.5]])
    deltas = torch.zeros(1, 2, 4)
    outputs = (torch.tensor([[2.0, 1.0]]), deltas)
    grids = [ImageSize(1, 1), ImageSize(1, 1)]
    strides = [INPUT, INPUT]
    found = propose([outputs, outputs], [wide, wide], grids=grids, strides=strides, image_sizes=SIZES, recipe=Recipe())
    assert int(found.valid.sum()) == 2
    assert found.boxes[0, :2].tolist() == [[0.0, 0.0, 8.0, 8.0]] * 2


def test_each_level_sends_its_best_and_the_image_keeps_its_best() -> None:
    apart = [[1.0, 2.0, 3.0, 4.0]]
    found = _propose([(apart, None), (apart, None)], recipe=replace(Recipe(), rpn_pre_nms=3, rpn_post_nms=4))
    assert found.boxes.shape == (1, 4, 4)
    assert found.valid.all()
    # the best two of both levels: cells (1, 1) and (1, 0)
    assert sorted(found.boxes[0, :2].tolist()) == [[24.0, 24.0, 40.0, 40.0]] * 2
    assert sorted(found.boxes[0, 2:].tolist()) == [[0.0, 24.0, 8.0, 40.0]] * 2


def test_slivers_and_low_scores_are_dropped() -> None:
    beside = torch.tensor([[[-9.0, 0.0, 0.0, 0.0]]])  # nine widths to the left of the image
    assert not _propose([([[5.0]], beside)]).valid.any()
    strict = replace(Recipe(), rpn_score_threshold=0.5)
    assert not _propose([([[-0.1]], None)], recipe=strict).valid.any()
    assert _propose([([[0.0]], None)], recipe=strict).valid.sum() == 1


def test_images_of_a_batch_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    logits, deltas = torch.randn(3, 16), torch.randn(3, 16, 4)
    sizes = torch.tensor([[60.0, 50.0], [64.0, 64.0], [40.0, 64.0]])
    together = _propose([(logits.tolist(), deltas)], sizes=sizes)
    for index in range(3):
        alone = _propose([(logits[index : index + 1].tolist(), deltas[index : index + 1])], sizes=sizes[index, None])
        assert torch.equal(together.boxes[index], alone.boxes[0])
        assert torch.equal(together.valid[index], alone.valid[0])


@torch.inference_mode()
def test_head_orders_its_outputs_as_anchors_are_counted() -> None:
    head = RPNHead(in_channels=2, anchors_per_cell=3, num_convs=1)
    level = torch.randn(2, 2, 4, 5)
    objectness, deltas = head(level)
    x = head.convs(level)
    for y, column, anchor in ((0, 0, 0), (2, 3, 1), (3, 4, 2)):
        index = (y * 5 + column) * 3 + anchor
        torch.testing.assert_close(objectness[:, index], head.objectness(x)[:, anchor, y, column])
        torch.testing.assert_close(deltas[:, index], head.deltas(x)[:, anchor * 4 : anchor * 4 + 4, y, column])


def test_logits_tell_apart_what_probabilities_cannot() -> None:
    # both probabilities are 1 in float32: they tie, and the first level stays first
    levels = [([[40.0, 0.0, 0.0, 0.0]], None), ([[0.0, 0.0, 0.0, 50.0]], None)]
    by_probability = _propose(levels)
    by_logit = _propose(levels, recipe=replace(Recipe(), rpn_ranking="logit"))
    assert by_probability.boxes[0, :2, 0].tolist() == [0.0, 24.0]
    assert by_logit.boxes[0, :2, 0].tolist() == [24.0, 0.0]


def test_one_anchor_by_hand() -> None:
    # A map of 2 × 2 and one of a single cell, two anchors in a cell. The convolution adds up what is around a cell, the
    # objectness of the second anchor is twice that, its deltas are 0, 1, 2 and 3 times it.
    head = RPNHead(in_channels=1, anchors_per_cell=2, num_convs=1)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    for name, parameter in head.convs.named_parameters():
        parameter.data.fill_(float(name.endswith("weight")))
    head.objectness.weight.data[1] = 2
    head.deltas.weight.data[4:, 0, 0, 0] = torch.arange(4.0)
    levels = [torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]]), torch.tensor([[[[16.0]]]])]
    objectness, deltas = head.of_anchors(levels, torch.tensor([[7, 9, 8]]))  # cells 3, 4 and 4
    assert objectness.tolist() == [[30.0, 32.0, 0.0]]
    assert deltas.tolist() == [[[0.0, 15.0, 30.0, 45.0], [0.0, 16.0, 32.0, 48.0], [0.0] * 4]]


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    num_images=st.integers(1, 2),
    num_convs=st.integers(1, 3),
    count=st.integers(1, 12),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_some_anchors_are_as_among_all(
    seed: int,
    grids: list[tuple[int, int]],
    num_images: int,
    num_convs: int,
    count: int,
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(seed)
    head = RPNHead(in_channels=4, anchors_per_cell=3, num_convs=num_convs).double()
    levels = [
        torch.randn(num_images, 4, *grid, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        for grid in grids
    ]
    index = torch.randint(3 * sum(height * width for height, width in grids), (num_images, count))  # some of them twice
    outputs = [head(level) for level in levels]
    expected = (
        torch.cat([objectness for objectness, _ in outputs], dim=1).gather(1, index),
        torch.cat([deltas for _, deltas in outputs], dim=1).gather(1, index[..., None].expand(-1, -1, 4)),
    )
    found = head.of_anchors(levels, index)
    weights = [torch.randn(values.shape) for values in expected]
    leaves = [*levels, *head.parameters()]
    gradients = []
    for outcome in (found, expected):
        gradients.append(torch.autograd.grad(outcome, leaves, weights))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("anchors_per_cell", [1, 3])
def test_of_maps_in_half_precision_they_are_near_those_among_all(anchors_per_cell: int) -> None:
    torch.manual_seed(0)
    head = RPNHead(in_channels=16, anchors_per_cell=anchors_per_cell, num_convs=1)
    levels = [torch.randn(2, 16, *grid).to(torch.bfloat16) for grid in ((8, 6), (4, 3))]
    index = torch.randint(60 * anchors_per_cell, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        objectness, deltas = head.of_anchors(levels, index)
        outputs = [head(level) for level in levels]
    assert objectness.dtype == deltas.dtype == torch.float32
    expected = torch.cat([one for one, _ in outputs], dim=1).gather(1, index)
    torch.testing.assert_close(objectness, expected, rtol=0.02, atol=0.01)


def test_gradients_of_what_many_anchors_see_are_rounded_once_and_alike_each_time() -> None:
    # 400 anchors on a map of two cells: in bfloat16 their sum, a few at a time, would lose what is below a 256th of it
    torch.manual_seed(0)
    head = RPNHead(in_channels=16, anchors_per_cell=3, num_convs=1)
    level = torch.randn(1, 16, 1, 2).to(torch.bfloat16).requires_grad_()
    exact = level.detach().float().requires_grad_()
    index = torch.randint(6, (1, 400))
    found: list[Tensor] = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            objectness, deltas = head.of_anchors([level], index)
        found += torch.autograd.grad(objectness.sum() + deltas.sum(), level)
    objectness, deltas = head.of_anchors([exact], index)
    (expected,) = torch.autograd.grad(objectness.sum() + deltas.sum(), exact)
    assert torch.equal(found[0], found[1])
    assert (found[0].float() - expected).norm() < 0.01 * expected.norm()

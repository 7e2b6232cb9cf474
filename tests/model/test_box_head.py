from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from model import conv_norm
from model.box_head import BoxHead, Chosen, choose
from model.recipe import Recipe
from model.rpn import Proposals

SIZES = torch.tensor([[100.0, 200.0]])


def _choose(probabilities: Tensor, boxes: Tensor, *, deltas: Tensor | None = None, threshold: float = 0.05) -> Chosen:
    """One image; each row of probabilities (P, K) with its proposal."""
    proposals = Proposals(boxes[None], torch.ones(1, len(boxes), dtype=torch.bool))
    return choose(
        probabilities.log(),
        torch.zeros(*probabilities.shape, 4) if deltas is None else deltas,
        proposals,
        image_sizes=SIZES,
        score_threshold=threshold,
        recipe=Recipe(),
    )


def _rows(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


APART = _rows([0.0, 0.0, 20.0, 20.0], [50.0, 50.0, 90.0, 90.0])
SAME = _rows([10.0, 10.0, 50.0, 50.0], [10.0, 10.0, 50.0, 48.0])


def test_on_a_gpu_in_training_the_weight_is_reordered_in_place_of_the_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    head = BoxHead(in_channels=8, resolution=3, num_convs=0, num_fcs=2, width=16, num_classes=4, norm=None)
    features = torch.randn(5, 8, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    of = [features, *head.parameters()]
    results = []
    for by_kernels in (False, True):
        monkeypatch.setattr(conv_norm, "run_kernels_on", lambda _, by_kernels=by_kernels: by_kernels)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = head(features)
        sums = [(one.float() * torch.linspace(-1, 1, one.numel()).view(one.shape)).sum() for one in outputs]
        results.append((*outputs, *torch.autograd.grad(torch.stack(sums).sum(), of)))
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 0.01 * expected.norm()


def test_scores_are_sorted_and_background_is_dropped() -> None:
    found = _choose(_rows([0.1, 0.3, 0.6], [0.2, 0.7, 0.1]), APART, threshold=0.15)
    torch.testing.assert_close(found.scores[0, :4], torch.tensor([0.7, 0.6, 0.3, 0.0]))
    assert found.labels[0, :4].tolist() == [1, 2, 1, 0]
    assert found.valid[0, :4].tolist() == [True, True, True, False]
    assert found.boxes[0, :3].tolist() == [APART[1].tolist(), APART[0].tolist(), APART[0].tolist()]


def test_the_threshold_itself_is_not_enough() -> None:
    score = float(torch.tensor([[0.5, 0.5]]).log().softmax(1)[0, 1])
    assert not _choose(_rows([0.5, 0.5]), APART[:1], threshold=score).valid.any()
    assert _choose(_rows([0.5, 0.5]), APART[:1], threshold=score - 1e-6).valid.sum() == 1


def test_overlap_suppresses_within_a_class_only() -> None:
    same_class = _choose(_rows([0.1, 0.9], [0.2, 0.8]), SAME)
    assert same_class.scores[same_class.valid].tolist() == pytest.approx([0.9])
    two_classes = _choose(_rows([0.04, 0.92, 0.04], [0.04, 0.04, 0.92]), SAME)
    assert sorted(two_classes.labels[two_classes.valid].tolist()) == [1, 2]


def test_boxes_take_the_deltas_of_their_own_class_and_are_clipped() -> None:
    deltas = torch.zeros(1, 3, 4)
    deltas[0, 2] = torch.tensor([10.0, 0.0, 0.0, 0.0])  # one width to the right, at a weight of 10
    found = _choose(_rows([0.0, 0.2, 0.8]), _rows([150.0, -5.0, 180.0, 20.0]), deltas=deltas)
    assert found.boxes[0, :2].tolist() == [[180.0, 0.0, 200.0, 20.0], [150.0, 0.0, 180.0, 20.0]]


def test_slivers_and_places_without_a_proposal_are_dropped() -> None:
    sliver = _rows([300.0, 10.0, 400.0, 50.0])  # beyond the image's right edge
    assert not _choose(_rows([0.1, 0.9]), sliver).valid.any()
    proposals = Proposals(APART[None], torch.tensor([[True, False]]))
    logits, deltas = _rows([0.1, 0.9], [0.1, 0.9]).log(), torch.zeros(2, 2, 4)
    found = choose(logits, deltas, proposals, image_sizes=SIZES, score_threshold=0.05, recipe=Recipe())
    assert found.boxes[found.valid].tolist() == [APART[0].tolist()]


def test_only_so_many_are_kept() -> None:
    x = torch.arange(150.0)
    boxes = torch.stack((x, x * 0, x + 0.5, x * 0 + 10), dim=1)
    probabilities = torch.stack((1 - x / 200 - 0.2, x / 200 + 0.2), dim=1)
    found = _choose(probabilities, boxes)
    assert found.valid.all()
    assert found.boxes[0, :, 0].tolist() == list(range(149, 49, -1))


def test_choice_is_torchvisions() -> None:
    torch.manual_seed(0)
    logits, deltas = torch.randn(300, 9) * 2.5, torch.randn(300, 9, 4)
    corner = torch.rand(300, 2) * 150
    boxes = torch.cat([corner, corner + torch.rand(300, 2) * 80], dim=1)
    theirs = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100)
    expected_boxes, expected_scores, expected_labels = theirs.postprocess_detections(
        logits, deltas.flatten(1), [boxes], [(100, 200)]
    )
    proposals = Proposals(boxes[None], torch.ones(1, 300, dtype=torch.bool))
    found = choose(logits, deltas, proposals, image_sizes=SIZES, score_threshold=0.05, recipe=Recipe())
    assert found.valid.all()
    assert torch.equal(found.labels[0], expected_labels[0])
    assert torch.equal(found.scores[0], expected_scores[0])
    assert torch.equal(found.boxes[0], expected_boxes[0])


def test_choice_from_no_proposals() -> None:
    proposals = Proposals(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    recipe = replace(Recipe(), max_detections=7)
    logits, deltas = torch.zeros(6, 3), torch.zeros(6, 3, 4)
    sizes = SIZES.repeat(2, 1)
    found = choose(logits, deltas, proposals, image_sizes=sizes, score_threshold=0.05, recipe=recipe)
    assert found.boxes.shape == (2, 7, 4)
    assert not found.valid.any()


@pytest.mark.parametrize(("num_convs", "num_fcs"), [(0, 2), (4, 1)])
@torch.inference_mode()
def test_head_is_convolutions_then_linear_layers(num_convs: int, num_fcs: int) -> None:
    torch.manual_seed(0)
    head = BoxHead(
        in_channels=4, resolution=3, num_convs=num_convs, num_fcs=num_fcs, width=16, num_classes=5, norm=None
    )
    features = torch.randn(6, 4, 3, 3)
    x = head.convs(features).flatten(1)
    for fc in head.fcs:
        x = fc(x).relu()
    for layout in (torch.contiguous_format, torch.channels_last):
        logits, deltas = head(features.to(memory_format=layout))
        torch.testing.assert_close(logits, head.class_logits(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(deltas, head.deltas(x).view(6, 5, 4), rtol=1e-5, atol=1e-5)

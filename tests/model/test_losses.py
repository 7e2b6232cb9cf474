"""Losses against loops, against torchvision's, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection import roi_heads
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.rpn import RegionProposalNetwork

from model.boxes import Places, encode, first_marked
from model.losses import (
    LossConfig,
    box_losses,
    keypoint_loss,
    mask_loss,
    rpn_losses,
    smooth_l1,
    softmax_mask_loss,
)
from model.matcher import Matches, match, take
from model.sampler import random_sampler
from tests.reference import losses as reference

RPN_WEIGHTS, BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)
CONFIG = LossConfig()


def random_boxes(*shape: int) -> Tensor:
    corner = torch.rand(*shape, 2) * 40
    return torch.cat([corner, corner + torch.rand(*shape, 2) * 30 + 1], dim=-1)


def random_rpn_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Matches, Places, Tensor]:
    """Objectness, deltas, anchors, matches, chosen, ground truth of 3 images, of which the last has no object."""
    torch.manual_seed(seed)
    anchors, gt_boxes, valid = (
        random_boxes(30),
        random_boxes(3, 4),
        torch.tensor([[True] * 4, [True, False] * 2, [False] * 4]),
    )
    gt_boxes = gt_boxes * valid[..., None]
    matches = match(anchors, gt_boxes, valid, positive_iou=0.4, negative_iou=0.2, allow_low_quality=True)
    chosen = random_sampler(count=8, positive_fraction=0.5)(matches.label)
    return torch.randn(3, 30), torch.randn(3, 30, 4), anchors, matches, chosen, gt_boxes


def marks(chosen: Places) -> Tensor:
    """(3, 30) whether each anchor of a case is chosen."""
    return torch.zeros(3, 30).scatter_add_(1, chosen.position, chosen.filled.float()) > 0


def random_box_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class logits, deltas, labels, boxes, ground truth; regions of background have none."""
    torch.manual_seed(seed)
    labels = torch.randint(5, (20,))
    return torch.randn(20, 5), torch.randn(20, 5, 4), labels, random_boxes(20), random_boxes(20) * (labels > 0)[:, None]


def rpn_losses_at(
    case: tuple[Tensor, Tensor, Tensor, Matches, Places, Tensor], config: LossConfig = CONFIG
) -> tuple[Tensor, Tensor]:
    """Of outputs for all anchors."""
    objectness, deltas, anchors, matches, chosen, gt_boxes = case
    outputs = objectness.gather(1, chosen.position), take(deltas, chosen.position)
    return rpn_losses(*outputs, anchors, matches, chosen, gt_boxes, config=config, delta_weights=RPN_WEIGHTS)


def box_losses_at(case: tuple[Tensor, ...], config: LossConfig = CONFIG) -> tuple[Tensor, Tensor]:
    logits, deltas, labels, boxes, gt_boxes = case
    return box_losses(logits, deltas, labels, boxes, gt_boxes, config=config, delta_weights=BOX_WEIGHTS)


def one_anchor(config: LossConfig) -> tuple[float, float]:
    """Of two images with one anchor each, one chosen and positive, one not chosen."""
    anchors = torch.tensor([[0.0, 0, 8, 8]])
    gt_boxes = torch.tensor([[[4.0, 0, 12, 8]]] * 2)  # dx 0.5
    matches = Matches(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int8))
    chosen = first_marked(torch.tensor([[True], [False]]), limit=1)
    losses = rpn_losses_at((torch.zeros(2, 1), torch.zeros(2, 1, 4), anchors, matches, chosen, gt_boxes), config)
    return losses[0].item(), losses[1].item()


def test_smooth_l1_by_hand() -> None:
    differences = torch.tensor([-2.0, 0, 0.25, 0.5, 3])
    # d² / 2 up to beta 0.5 is d²; |d| - 0.25 above
    assert smooth_l1(differences, torch.zeros(5), 0.5).tolist() == [1.75, 0, 0.0625, 0.25, 2.75]
    assert smooth_l1(differences, torch.zeros(5), 0.0).tolist() == [2, 0, 0.25, 0.5, 3]  # detectron2's: plain L1
    found = smooth_l1(torch.linspace(-1, 1, 41), torch.full((41,), 0.1), 1 / 9)
    expected = [reference.smooth_l1(value / 20 - 1 - 0.1, 1 / 9) for value in range(41)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_rpn_losses_by_hand() -> None:
    # A logit of 0 is worth log 2; dx is 0.5 off, above a beta of 1/9.
    assert one_anchor(CONFIG) == pytest.approx((math.log(2), 0.5 - 1 / 18))
    plain = LossConfig(rpn_beta=0.0)
    assert one_anchor(plain) == pytest.approx((math.log(2), 0.5))
    # detectron2 divides by the 4 samples each of the 2 images may have, though 1 was sampled
    fixed = LossConfig(rpn_beta=0.0, rpn_normaliser="fixed", rpn_samples=4)
    assert one_anchor(fixed) == pytest.approx((math.log(2) / 8, 0.5 / 8))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_rpn_losses_are_torchvisions(seed: int) -> None:
    case = random_rpn_case(seed)
    objectness, deltas, anchors, matches, chosen, gt_boxes = case
    marked = marks(chosen)
    targets = [BoxCoder(RPN_WEIGHTS).encode_single(boxes, anchors) for boxes in take(gt_boxes, matches.gt_index)]

    class Network:
        """As much of it as compute_loss uses."""

        @staticmethod
        def fg_bg_sampler(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            return list((torch.stack(labels) == 1) & marked), list((torch.stack(labels) == 0) & marked)

    expected = RegionProposalNetwork.compute_loss(
        Network(), objectness, deltas.flatten(0, 1), list(matches.label.float()), targets
    )
    torch.testing.assert_close(rpn_losses_at(case), expected)


@pytest.mark.parametrize("normaliser", ["sampled", "fixed"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_rpn_losses_agree_with_the_loop(normaliser: str, beta: float) -> None:
    case = random_rpn_case(7)
    config = LossConfig(rpn_beta=beta, rpn_normaliser=normaliser, rpn_samples=10)  # type: ignore[arg-type]
    objectness, deltas, anchors, matches, chosen, gt_boxes = case
    class_loss, box_loss = 0.0, 0.0
    for image, place in marks(chosen).nonzero().tolist():
        positive = matches.label[image, place].item() == 1
        class_loss += reference.binary_cross_entropy(objectness[image, place].item(), float(positive))
        if positive:
            gt_box = gt_boxes[image, int(matches.gt_index[image, place])]
            off = deltas[image, place] - encode(anchors[place], gt_box, weights=RPN_WEIGHTS)
            box_loss += sum(reference.smooth_l1(each, beta or 1e-12) for each in off.tolist())
    divisor = int(chosen.filled.sum()) if normaliser == "sampled" else 10 * 3
    found = rpn_losses_at(case, config)
    assert [loss.item() for loss in found] == pytest.approx([class_loss / divisor, box_loss / divisor])


def test_box_losses_by_hand() -> None:
    # Two regions and an empty place. Logits of the first favour its label 1 by log 3: 3 of 1 + 3. Its own dx, 2, is
    # worth 10 × 0.1, and half off; the deltas of the other class and of background do not count.
    logits = torch.tensor([[0.0, math.log(3)], [0, 0], [9, -9]])
    deltas = torch.full((3, 2, 4), 7.0)
    deltas[0, 1] = torch.tensor([1.5, 0, 0, 0])
    boxes = torch.tensor([[0.0, 0, 10, 10], [3, 3, 9, 9], [0, 0, 0, 0]])
    gt_boxes = torch.tensor([[1.0, 0, 11, 10], [0, 0, 0, 0], [0, 0, 0, 0]])
    case = (logits, deltas, torch.tensor([1, 0, -1]), boxes, gt_boxes)
    class_loss, box_loss = box_losses_at(case)
    assert class_loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert box_loss.item() == pytest.approx((0.5 - 1 / 18) / 2)
    assert box_losses_at(case, LossConfig(box_beta=0.0))[1].item() == pytest.approx(0.5 / 2)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_box_losses_are_torchvisions(seed: int) -> None:
    case = random_box_case(seed)
    logits, deltas, labels, boxes, gt_boxes = case
    targets = BoxCoder(BOX_WEIGHTS).encode_single(gt_boxes, boxes)
    expected = roi_heads.fastrcnn_loss(logits, deltas.flatten(1), [labels], [targets])
    torch.testing.assert_close(box_losses_at(case), expected)


def test_box_losses_agree_with_the_loop() -> None:
    logits, deltas, labels, boxes, gt_boxes = random_box_case(3)
    labels[4], labels[9] = -1, -1
    class_loss, box_loss = 0.0, 0.0
    for region, label in enumerate(labels.tolist()):
        if label >= 0:
            class_loss += reference.cross_entropy(logits[region].tolist(), label)
        if label > 0:
            off = deltas[region, label] - encode(boxes[region], gt_boxes[region], weights=BOX_WEIGHTS)
            box_loss += sum(reference.smooth_l1(each, 1 / 9) for each in off.tolist())
    found = box_losses_at((logits, deltas, labels, boxes, gt_boxes))
    assert [loss.item() for loss in found] == pytest.approx([class_loss / 18, box_loss / 18])


def test_mask_losses_by_hand() -> None:
    # One region of 1 × 2 cells, label 2 of 3 classes. Sigmoid: scores 3/4 and 1/2 of cells that are and are not set.
    logits = torch.tensor([[[math.log(3), 0.0]]])
    targets = torch.tensor([[[1.0, 0.0]]])
    assert mask_loss(logits, targets).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    # Softmax: 3 of 1 + 1 + 3 in the first cell, background's 1 of 1 + 1 + 1 in the second.
    classes = torch.zeros(1, 3, 1, 2)
    classes[0, 2] = logits[0]
    softmax = softmax_mask_loss(classes, torch.tensor([2]), targets)
    assert softmax.item() == pytest.approx((math.log(5 / 3) + math.log(3)) / 2)
    # A cell set by half is half of each.
    halves = softmax_mask_loss(classes, torch.tensor([2]), targets * 0 + 0.5)
    assert halves.item() == pytest.approx(((math.log(5 / 3) + math.log(5)) / 2 + math.log(3)) / 2)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.booleans())
def test_mask_losses_agree_with_torchvision_and_the_loop(seed: int, soft: bool) -> None:
    torch.manual_seed(seed)
    bitmaps, boxes, gt_index = torch.rand(3, 40, 50).round(), random_boxes(4), torch.randint(3, (4,))
    logits, gt_labels = torch.randn(4, 5, 6, 6), torch.randint(1, 5, (3,))
    targets = roi_heads.project_masks_on_boxes(bitmaps, boxes, gt_index, 6)
    labels = gt_labels[gt_index]
    expected = roi_heads.maskrcnn_loss(logits, [boxes], [bitmaps], [gt_labels], [gt_index])
    torch.testing.assert_close(mask_loss(logits[torch.arange(4), labels], targets), expected)
    if not soft:
        targets = targets.round()
    total = 0.0
    for region, y, x in torch.ones(4, 6, 6).nonzero().tolist():
        cell, target = logits[region, :, y, x].tolist(), targets[region, y, x].item()
        total += target * reference.cross_entropy(cell, int(labels[region]))
        total += (1 - target) * reference.cross_entropy(cell, 0)
    assert softmax_mask_loss(logits, labels, targets).item() == pytest.approx(total / (4 * 36), rel=1e-5)


def test_keypoint_loss_by_hand() -> None:
    # Two keypoints of a 1 × 2 heatmap, the second not there; the first favours its cell 3 to 1.
    heatmaps = torch.tensor([[[[0.0, math.log(3)]], [[5.0, -5.0]]]])
    index, valid = torch.tensor([[1, 0]]), torch.tensor([[True, False]])
    assert keypoint_loss(heatmaps, index, valid, num_images=2, config=CONFIG).item() == pytest.approx(math.log(4 / 3))
    # detectron2's other choice: 2 images of 8 × 0.25 positives with 2 keypoints each
    fixed = LossConfig(keypoint_normaliser="fixed", box_samples=8)
    found = keypoint_loss(heatmaps, index, valid, num_images=2, config=fixed)
    assert found.item() == pytest.approx(math.log(4 / 3) / (2 * 8 * 0.25 * 2))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_keypoint_loss_agrees_with_torchvision_and_the_loop(seed: int) -> None:
    torch.manual_seed(seed)
    heatmaps, boxes, gt_index = torch.randn(4, 3, 7, 7), random_boxes(4), torch.randint(2, (4,))
    keypoints = torch.cat([torch.rand(2, 3, 2) * 60, torch.randint(3, (2, 3, 1))], dim=2)
    index, valid = roi_heads.keypoints_to_heatmap(keypoints[gt_index], boxes, 7)
    found = keypoint_loss(heatmaps, index, valid.bool(), num_images=1, config=CONFIG)
    torch.testing.assert_close(found, roi_heads.keypointrcnn_loss(heatmaps, [boxes], [keypoints], [gt_index]))
    losses = [
        reference.cross_entropy(heatmaps[region, keypoint].flatten().tolist(), int(index[region, keypoint]))
        for region, keypoint in valid.nonzero().tolist()
    ]
    assert found.item() == pytest.approx(sum(losses) / max(1, len(losses)), rel=1e-5)


def test_gradients() -> None:
    objectness, deltas, anchors, matches, chosen, gt_boxes = random_rpn_case(1)
    logits, region_deltas, labels, boxes, region_gt = random_box_case(1)
    masks = torch.rand(20, 3, 3)
    index, valid = torch.randint(9, (20, 5)), torch.rand(20, 5) < 0.5
    cases: list[tuple[Callable[..., Tensor | tuple[Tensor, Tensor]], tuple[Tensor, ...]]] = [
        (lambda *x: rpn_losses_at((*x, anchors, matches, chosen, gt_boxes)), (objectness, deltas)),
        (lambda *x: box_losses_at((*x, labels, boxes, region_gt)), (logits, region_deltas)),
        (lambda x: smooth_l1(x, masks.double(), 1 / 9), (torch.randn(20, 3, 3),)),
        (lambda x: mask_loss(x, masks), (torch.randn(20, 3, 3),)),
        (lambda x: softmax_mask_loss(x, labels, masks), (torch.randn(20, 5, 3, 3),)),
        (lambda x: keypoint_loss(x, index, valid, num_images=1, config=CONFIG), (torch.randn(20, 5, 3, 3),)),
    ]
    for loss, inputs in cases:
        assert torch.autograd.gradcheck(loss, [values.double().requires_grad_() for values in inputs])


def test_what_is_not_counted_has_no_gradient() -> None:
    objectness, deltas, anchors, matches, chosen, gt_boxes = random_rpn_case(2)
    anchors[marks(chosen).any(dim=0).logical_not().nonzero()[0]] = 3.0  # an anchor without sides that no image chose
    outputs = (objectness.requires_grad_(), deltas.requires_grad_())
    losses = rpn_losses_at((*outputs, anchors, matches, chosen, gt_boxes))
    of_objectness, of_deltas = torch.autograd.grad(losses[0] + losses[1], outputs)
    assert torch.equal(of_objectness != 0, marks(chosen))
    assert torch.equal((of_deltas != 0).any(dim=2), marks(chosen) & (matches.label == 1))


def test_boxes_are_no_way_for_gradients() -> None:
    logits, deltas, labels, boxes, gt_boxes = random_box_case(4)
    loss = box_losses_at((logits, deltas.requires_grad_(), labels, boxes.requires_grad_(), gt_boxes))[1]
    of_deltas, of_boxes = torch.autograd.grad(loss, (deltas, boxes), allow_unused=True)
    assert of_deltas.any()
    assert of_boxes is None


def zero_of_nothing() -> dict[str, tuple[list[Tensor], Callable[..., Tensor | tuple[Tensor, Tensor]]]]:
    """Outputs of heads for nothing to be learnt, and their losses."""
    none, no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    empty = Matches(torch.zeros(2, 6, dtype=torch.int64), torch.full((2, 6), -1, dtype=torch.int8))
    nowhere = torch.full((4,), -1)
    return {
        "nothing chosen, no ground truth": (
            [torch.randn(2, 6), torch.randn(2, 6, 4)],
            lambda *x: rpn_losses_at(
                (*x, torch.zeros(6, 4), empty, first_marked(torch.zeros(2, 6) > 0, limit=3), torch.zeros(2, 0, 4))
            ),
        ),
        "no images": (
            [torch.randn(0, 6), torch.randn(0, 6, 4)],
            lambda *x: rpn_losses_at(
                (
                    *x,
                    torch.zeros(6, 4),
                    Matches(*(each[:0] for each in empty)),
                    first_marked(torch.zeros(0, 6) > 0, limit=3),
                    torch.zeros(0, 3, 4),
                ),
                LossConfig(rpn_normaliser="fixed"),
            ),
        ),
        "no regions": (
            [torch.randn(0, 5), torch.randn(0, 5, 4)],
            lambda *x: box_losses_at((*x, none, no_boxes, no_boxes)),
        ),
        "empty places": (
            [torch.randn(4, 5), torch.randn(4, 5, 4)],
            lambda *x: box_losses_at((*x, nowhere, torch.zeros(4, 4), torch.zeros(4, 4))),
        ),
        "no masks": ([torch.randn(0, 7, 7)], lambda x: mask_loss(x, torch.zeros(0, 7, 7))),
        "no softmax masks": ([torch.randn(0, 5, 7, 7)], lambda x: softmax_mask_loss(x, none, torch.zeros(0, 7, 7))),
        "no keypoints": (
            [torch.randn(0, 3, 7, 7)],
            lambda x: keypoint_loss(x, none.view(0, 3), none.view(0, 3) > 0, num_images=0, config=CONFIG),
        ),
        "hidden keypoints": (
            [torch.randn(2, 3, 7, 7)],
            lambda x: keypoint_loss(
                x, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3) > 0, num_images=1, config=CONFIG
            ),
        ),
        "no image of keypoints": (
            [torch.randn(0, 3, 7, 7)],
            lambda x: keypoint_loss(
                x, none.view(0, 3), none.view(0, 3) > 0, num_images=0, config=LossConfig(keypoint_normaliser="fixed")
            ),
        ),
    }


@pytest.mark.parametrize("name", list(zero_of_nothing()))
def test_nothing_to_learn_is_zero_with_a_graph(name: str) -> None:
    outputs, loss = zero_of_nothing()[name]
    found = loss(*(values.requires_grad_() for values in outputs))
    losses = torch.stack(found if isinstance(found, tuple) else (found,))
    assert losses.tolist() == [0.0] * len(outputs)
    for gradient, values in zip(torch.autograd.grad(losses.sum(), outputs), outputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(values))


@pytest.mark.parametrize("autocast", [False, True])
def test_losses_of_half_precision_are_float32(autocast: bool) -> None:
    logits, deltas, labels, boxes, gt_boxes = random_box_case(5)
    half = logits.bfloat16(), deltas.bfloat16()
    expected = box_losses_at((half[0].float(), half[1].float(), labels, boxes, gt_boxes))
    masks, heatmaps = torch.randn(4, 7, 7).bfloat16(), torch.randn(4, 2, 7, 7).bfloat16()
    targets, index, valid = torch.rand(4, 7, 7), torch.randint(49, (4, 2)), torch.ones(4, 2, dtype=torch.bool)
    objectness, rpn_deltas, *rest = random_rpn_case(5)
    rpn_case = (objectness.bfloat16(), rpn_deltas.bfloat16(), *rest)
    rpn_expected = rpn_losses_at((objectness.bfloat16().float(), rpn_deltas.bfloat16().float(), *rest))  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = box_losses_at((*half, labels, boxes, gt_boxes))
        rpn_found = rpn_losses_at(rpn_case)  # type: ignore[arg-type]
        others = [
            (mask_loss(masks, targets), mask_loss(masks.float(), targets)),
            (
                softmax_mask_loss(heatmaps, torch.ones(4, dtype=torch.int64), targets),
                softmax_mask_loss(heatmaps.float(), torch.ones(4, dtype=torch.int64), targets),
            ),
            (
                keypoint_loss(heatmaps, index, valid, num_images=1, config=CONFIG),
                keypoint_loss(heatmaps.float(), index, valid, num_images=1, config=CONFIG),
            ),
        ]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(rpn_found, rpn_expected, rtol=0, atol=0)
    for low, full in others:
        assert low.dtype == torch.float32
        assert torch.equal(low, full)


def test_defaults_are_torchvisions() -> None:
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    rpn, heads = theirs.rpn, theirs.roi_heads
    assert (CONFIG.rpn_positive_iou, CONFIG.rpn_negative_iou) == (
        rpn.proposal_matcher.high_threshold,
        rpn.proposal_matcher.low_threshold,
    )
    assert (CONFIG.rpn_samples, CONFIG.rpn_positive_fraction) == (
        rpn.fg_bg_sampler.batch_size_per_image,
        rpn.fg_bg_sampler.positive_fraction,
    )
    assert (CONFIG.rpn_pre_nms, CONFIG.rpn_post_nms) == (
        rpn._pre_nms_top_n["training"],
        rpn._post_nms_top_n["training"],
    )
    assert CONFIG.box_positive_iou == heads.proposal_matcher.high_threshold == heads.proposal_matcher.low_threshold
    assert (CONFIG.box_samples, CONFIG.box_positive_fraction) == (
        heads.fg_bg_sampler.batch_size_per_image,
        heads.fg_bg_sampler.positive_fraction,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rpn_samples": 0}, "rpn_samples must be at least 1, got 0"),
        ({"box_beta": -0.1}, "box_beta must be at least 0"),
        ({"rpn_positive_iou": 1.5}, "rpn_positive_iou must be above 0 and at most 1"),
        ({"crowd_overlap": 0.0}, "crowd_overlap must be above 0"),
        ({"rpn_negative_iou": 0.8}, r"between 0 and rpn_positive_iou 0\.7, got 0\.8"),
        ({"mask_target": "sharp"}, "mask_target must be one of soft, binary, polygon"),
        ({"rpn_normaliser": "mean"}, "rpn_normaliser must be one of sampled, fixed"),
    ],
)
def test_values_out_of_their_bounds_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)  # type: ignore[arg-type]


def test_a_configuration_survives_json() -> None:
    config = LossConfig(mask_target="polygon", rpn_beta=0.0)
    assert LossConfig.from_json(config.to_json()) == config

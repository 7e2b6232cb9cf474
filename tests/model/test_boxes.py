from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from model import boxes as box_math
from tests.reference import anchors as reference
from tests.reference import matcher as overlaps

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CLIP = math.log(1000 / 16)


def _random_boxes(count: int) -> torch.Tensor:
    corner, side = torch.rand(count, 2) * 500, torch.rand(count, 2) * 200 + 1
    return torch.cat([corner, corner + side], dim=1)


def test_decode_by_hand() -> None:
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # 20 × 40 around (20, 40)
    deltas = torch.tensor([[1.0, -0.5, math.log(2), math.log(0.5)]])
    # centre (20 + 20, 40 - 20), 40 × 20
    found = box_math.decode(deltas, box, weights=(1, 1, 1, 1), max_log_scale=CLIP)
    torch.testing.assert_close(found, torch.tensor([[20.0, 10.0, 60.0, 30.0]]))


def test_scale_of_a_delta_is_bounded() -> None:
    box = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    found = box_math.decode(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), box, weights=(1, 1, 1, 1), max_log_scale=CLIP)
    torch.testing.assert_close(found[0, 2] - found[0, 0], torch.tensor(1000.0))


def test_decode_inverts_encode() -> None:
    torch.manual_seed(0)
    boxes, targets = _random_boxes(50), _random_boxes(50)
    deltas = torch.tensor(
        [
            reference.encode(tuple(target), tuple(box), WEIGHTS)
            for target, box in zip(targets.tolist(), boxes.tolist(), strict=True)
        ]
    )
    found = box_math.decode(deltas, boxes, weights=WEIGHTS, max_log_scale=10.0)
    torch.testing.assert_close(found, targets, rtol=0, atol=1e-3)


def test_decode_is_torchvisions_bit_for_bit() -> None:
    torch.manual_seed(0)
    boxes, deltas = _random_boxes(200), torch.randn(200, 4) * 5
    theirs = BoxCoder(WEIGHTS).decode(deltas, [boxes])[:, 0]
    assert torch.equal(box_math.decode(deltas, boxes, weights=WEIGHTS, max_log_scale=CLIP), theirs)


def test_encode_by_hand() -> None:
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # 20 × 40 around (20, 40)
    target = torch.tensor([[20.0, 10.0, 60.0, 30.0]])  # 40 × 20 around (40, 20)
    expected = torch.tensor([[2 * 20 / 20, 3 * -20 / 40, 4 * math.log(40 / 20), 5 * math.log(20 / 40)]])
    torch.testing.assert_close(box_math.encode(box, target, weights=(2, 3, 4, 5)), expected)


def test_encode_agrees_with_the_loop_and_decode_inverts_it() -> None:
    torch.manual_seed(1)
    boxes, targets = _random_boxes(60).view(3, 20, 4), _random_boxes(60).view(3, 20, 4)
    found = box_math.encode(boxes, targets, weights=WEIGHTS)
    for deltas, target, box in zip(found.view(-1, 4), targets.view(-1, 4), boxes.view(-1, 4), strict=True):
        expected = reference.encode(tuple(target.tolist()), tuple(box.tolist()), WEIGHTS)
        torch.testing.assert_close(deltas, torch.tensor(expected), rtol=0, atol=1e-3)
    again = box_math.decode(found, boxes, weights=WEIGHTS, max_log_scale=10.0)
    torch.testing.assert_close(again, targets, rtol=0, atol=1e-3)


@given(st.integers(0, 2**31), st.sampled_from([WEIGHTS, (1.0, 1.0, 1.0, 1.0), (0.1, 0.3, 0.7, 1.9)]))
def test_encode_is_torchvisions_bit_for_bit(seed: int, weights: tuple[float, float, float, float]) -> None:
    torch.manual_seed(seed)
    boxes, targets = _random_boxes(67), _random_boxes(67)
    assert torch.equal(
        box_math.encode(boxes, targets, weights=weights), BoxCoder(weights).encode([targets], [boxes])[0]
    )


def test_gradients_of_encode() -> None:
    torch.manual_seed(2)
    boxes, targets = (_random_boxes(3).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda *each: box_math.encode(*each, weights=WEIGHTS), (boxes, targets))


def test_half_precision_boxes_are_encoded_in_float32() -> None:
    torch.manual_seed(3)
    boxes, targets = _random_boxes(20).bfloat16(), _random_boxes(20).bfloat16()
    found = box_math.encode(boxes, targets, weights=WEIGHTS)
    assert found.dtype == torch.float32
    expected = box_math.encode(boxes.float(), targets.float(), weights=WEIGHTS)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_overlaps_by_hand() -> None:
    # 4 × 4 and 4 × 2 share 2 × 2: 4 of 16 + 8 - 4
    one, other = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 2, 6, 4], [4, 0, 8, 4], [0, 0, 4, 4]])
    assert box_math.intersection(one, other).tolist() == [[4.0, 0.0, 16.0]]
    torch.testing.assert_close(box_math.iou(one, other), torch.tensor([[4 / 20, 0.0, 1.0]]))
    assert box_math.area(other).tolist() == [8.0, 16.0, 16.0]


@given(st.integers(0, 2**31))
def test_iou_is_torchvisions_bit_for_bit_and_the_loops(seed: int) -> None:
    torch.manual_seed(seed)
    boxes, others = _random_boxes(14).view(2, 7, 4), _random_boxes(10).view(2, 5, 4)
    found = box_math.iou(boxes, others)  # (2, 7, 5)
    for image in range(2):
        assert torch.equal(found[image], box_iou(boxes[image], others[image]))
        expected = [[overlaps.iou(box, other) for other in others[image].tolist()] for box in boxes[image].tolist()]
        torch.testing.assert_close(found[image], torch.tensor(expected), rtol=0, atol=1e-5)
    assert torch.equal(box_math.iou(others, boxes), found.transpose(1, 2))


def test_boxes_without_area_do_not_overlap() -> None:
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert box_math.iou(point, point).tolist() == [[0.0]]
    assert box_math.iou(point, torch.tensor([[0.0, 0, 9, 9]])).tolist() == [[0.0]]


def test_decoding_follows_a_shift_of_the_boxes() -> None:
    torch.manual_seed(0)
    boxes, deltas = _random_boxes(20), torch.randn(20, 4)
    here = box_math.decode(deltas, boxes, weights=WEIGHTS, max_log_scale=CLIP)
    there = box_math.decode(deltas, boxes + 100, weights=WEIGHTS, max_log_scale=CLIP)
    torch.testing.assert_close(there, here + 100, rtol=0, atol=1e-3)


def test_clip_cuts_each_box_to_its_own_image() -> None:
    boxes = torch.tensor([[-5.0, -5.0, 50.0, 50.0], [-5.0, 3.0, 50.0, 50.0]])
    sizes = torch.tensor([[20.0, 30.0], [60.0, 40.0]])
    assert box_math.clip(boxes, sizes).tolist() == [[0.0, 0.0, 30.0, 20.0], [0.0, 3.0, 40.0, 50.0]]


def test_scale_takes_height_and_width_apart() -> None:
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert box_math.scale(boxes, torch.tensor([[10.0, 100.0]])).tolist() == [[100.0, 20.0, 300.0, 40.0]]


def test_a_side_of_just_the_bound_is_wide_enough() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.25], [0.0, 0.0, 0.25, 9.0]])
    assert box_math.wide_enough(boxes, 0.5).tolist() == [True, False, False]


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_first_of_each_image_agrees_with_the_loop(image_index: list[int], limit: int) -> None:
    positions, filled = box_math.first_of_each_image(
        torch.tensor(image_index, dtype=torch.int64), num_images=4, limit=limit
    )
    for image in range(4):
        expected = [position for position, owner in enumerate(image_index) if owner == image][:limit]
        assert positions[image][filled[image]].tolist() == expected
        assert filled[image].tolist() == [place < len(expected) for place in range(limit)]


@given(st.data(), st.integers(0, 3), st.integers(0, 20), st.integers(0, 8))
def test_first_marked_agrees_with_the_loop(data: st.DataObject, num_rows: int, num_marks: int, limit: int) -> None:
    marked = data.draw(st.lists(st.lists(st.booleans(), min_size=num_marks, max_size=num_marks), max_size=num_rows))
    rows = torch.tensor(marked, dtype=torch.bool).view(len(marked), num_marks)
    found = box_math.first_marked(rows, limit=limit)
    for row, position, filled in zip(marked, found.position.tolist(), found.filled.tolist(), strict=True):
        expected = [place for place, is_marked in enumerate(row) if is_marked][:limit]
        assert position == expected + [0] * (limit - len(expected))
        assert filled == [place < len(expected) for place in range(limit)]


def test_no_boxes() -> None:
    none = torch.zeros(0, 4)
    assert box_math.decode(none, none, weights=WEIGHTS, max_log_scale=CLIP).shape == (0, 4)
    assert box_math.encode(none, none, weights=WEIGHTS).shape == (0, 4)
    assert box_math.iou(none, torch.zeros(3, 4)).shape == (0, 3)
    assert box_math.clip(none, torch.zeros(0, 2)).shape == (0, 4)
    assert box_math.wide_enough(none, 1.0).shape == (0,)

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder

from model import boxes as box_math
from tests.reference import anchors as reference

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


def test_no_boxes() -> None:
    none = torch.zeros(0, 4)
    assert box_math.decode(none, none, weights=WEIGHTS, max_log_scale=CLIP).shape == (0, 4)
    assert box_math.clip(none, torch.zeros(0, 2)).shape == (0, 4)
    assert box_math.wide_enough(none, 1.0).shape == (0,)

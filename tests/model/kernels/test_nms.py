"""The kernel that suppresses in sorted segments: by hand, against a loop and against what CPUs run; and it compiles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.nms import segment_nms
from tests.model.kernels.compiling import compiled_ptx
from tests.reference import nms as reference

pytest.importorskip("triton")
from model.kernels.nms import BLOCK, NUM_WARPS, sorted_nms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case(NamedTuple):
    boxes: Tensor
    valid: Tensor
    labels: Tensor


def random_case(seed: int, num_segments: int, num_places: int, *, side: int, filled: float, num_labels: int) -> Case:
    """Boxes on the pixels of a small square, so with equal and with empty ones, and IoUs at the thresholds."""
    random = torch.Generator().manual_seed(seed)
    shape = (num_segments, num_places)
    corner = torch.randint(side, (*shape, 2), generator=random)
    extent = torch.randint(side, (*shape, 2), generator=random)
    boxes = torch.cat([corner, corner + extent], dim=-1).float()
    valid = torch.rand(shape, generator=random) < filled
    boxes[~valid] = torch.tensor([math.nan, -math.inf, math.inf, 1.0])  # nobody may look
    return Case(boxes, valid, torch.randint(num_labels, shape, generator=random))


def by_kernel(case: Case, iou_threshold: float, limit: int | None = None) -> list[list[bool]]:
    boxes, valid, labels = (tensor.to(DEVICE) for tensor in case)
    kept = sorted_nms(boxes, valid, iou_threshold, labels=labels, limit=limit)
    assert kept.dtype == torch.bool
    return kept.tolist()


def by_loop(case: Case, iou_threshold: float, limit: int) -> list[list[bool]]:
    kept = reference.sorted_nms(case.boxes.numpy(), case.valid.numpy(), case.labels.numpy(), iou_threshold, limit)
    return [[bool(stays) for stays in segment] for segment in kept]


def by_segment_nms(case: Case, iou_threshold: float) -> list[list[bool]]:
    places = case.valid.nonzero()  # (places filled, 2)
    segments = places[:, 0] * (int(case.labels.max()) + 1) + case.labels[case.valid]
    best_first = torch.arange(len(places), 0, -1).float()
    kept = torch.zeros_like(case.valid)
    kept[tuple(places[segment_nms(case.boxes[case.valid], best_first, segments, iou_threshold)].T)] = True
    return kept.tolist()


def one_segment(*boxes: tuple[float, float, float, float]) -> Case:
    shape = (1, len(boxes))
    return Case(
        torch.tensor([boxes], dtype=torch.float32),
        torch.ones(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.int64),
    )


def test_an_earlier_kept_box_suppresses() -> None:
    # The first overlaps the second by 8 of 12 and the third by 5 of 15, the second the third by 7 of 13.
    case = one_segment((0, 0, 10, 10), (2, 0, 12, 10), (5, 0, 15, 10), (20, 0, 30, 10))
    assert by_kernel(case, 0.5) == [[True, False, True, True]]
    assert by_kernel(case, 0.3) == [[True, False, False, True]]
    assert by_kernel(case, 0.5, limit=2) == [[True, False, True, False]]
    assert by_kernel(case._replace(labels=torch.tensor([[0, 1, 1, 0]])), 0.5) == [[True, True, False, True]]
    assert by_kernel(case._replace(labels=torch.tensor([[2**40, 0, 2**40, 0]])), 0.3) == [[True, True, False, True]]
    assert by_kernel(case._replace(valid=torch.tensor([[False, True, True, True]])), 0.5) == [
        [False, True, False, True]
    ]


@pytest.mark.parametrize("labels", [None, torch.zeros(2, 3, dtype=torch.int64)])
def test_segments_do_not_see_each_other(labels: Tensor | None) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 20, 10, 30]]).repeat(2, 1, 1)
    valid = torch.tensor([[True, True, True], [False, True, True]])
    labels = labels if labels is None else labels.to(DEVICE)
    kept = sorted_nms(boxes.to(DEVICE), valid.to(DEVICE), 0.5, labels=labels)
    assert kept.tolist() == [[True, False, True], [False, True, True]]


@pytest.mark.parametrize(("short_side", "kept"), [(5.0, True), (1.0, False), (7.0, True)])
def test_the_threshold_is_compared_in_double(short_side: float, kept: bool) -> None:
    # 5/10 is exact and not above 0.5; 1/10 rounds up in float32 and lies above the double 0.1; 7/10 rounds down.
    case = one_segment((0, 0, 10, 10), (0, 0, 10, short_side))
    assert by_kernel(case, short_side / 10) == [[True, kept]]
    assert by_loop(case, short_side / 10, 2) == [[True, kept]]


def test_each_step_is_rounded_as_on_the_cpu() -> None:
    """Halves of boxes, whose IoU is 0.5 but for rounding: a product and a sum rounded once decide otherwise."""
    random = torch.Generator().manual_seed(0)
    corner, extent = torch.rand(2, 100, 2, generator=random).mul(1000).unbind()
    half = extent * torch.tensor([0.5, 1.0])
    boxes = torch.stack([torch.cat([corner, corner + size], dim=1) for size in (extent, half)], dim=1)  # (100, 2, 4)
    case = Case(boxes, torch.ones(100, 2, dtype=torch.bool), torch.zeros(100, 2, dtype=torch.int64))
    kept = by_segment_nms(case, 0.5)
    assert by_kernel(case, 0.5) == kept
    assert 30 < sum(map(sum, kept)) - 100 < 90  # both occur


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    num_segments=st.integers(1, 3),
    num_places=st.integers(1, 90),
    side=st.sampled_from([3, 12, 100]),
    filled=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    num_labels=st.integers(1, 3),
    iou_threshold=st.sampled_from([0.0, 0.1, 0.5, 0.7]),
    limit=st.sampled_from([0, 1, 7, 40, 1000]),
)
def test_agrees_with_the_loop(
    seed: int,
    num_segments: int,
    num_places: int,
    side: int,
    filled: float,
    num_labels: int,
    iou_threshold: float,
    limit: int,
) -> None:
    case = random_case(seed, num_segments, num_places, side=side, filled=filled, num_labels=num_labels)
    assert by_kernel(case, iou_threshold, limit) == by_loop(case, iou_threshold, limit)


@pytest.mark.parametrize("num_places", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("iou_threshold", [0.1, 0.5, 0.7])
def test_agrees_with_segment_nms(num_places: int, iou_threshold: float) -> None:
    case = random_case(num_places, 2, num_places, side=60, filled=0.9, num_labels=2)
    kept = by_segment_nms(case, iou_threshold)
    assert by_kernel(case, iou_threshold) == kept
    assert sum(map(sum, kept)) > BLOCK or num_places < 2 * BLOCK  # so that more than a block is compared with


@pytest.mark.parametrize("limit", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1])
def test_the_first_so_many_are_kept(limit: int) -> None:
    num_places = 2 * BLOCK + 1
    case = one_segment(*[(20.0 * (place // 2), 0, 20.0 * (place // 2) + 10, 10) for place in range(2 * num_places)])
    want = [place % 2 == 0 and place // 2 < limit for place in range(2 * num_places)]
    assert by_kernel(case, 0.5, limit) == [want]


def test_a_chain_of_suppressions_is_followed_through_a_block() -> None:
    """Each overlaps the next alone: every second stays, which takes as many rounds as there are boxes."""
    num_places = BLOCK + 7
    case = one_segment(*[(4.0 * place, 0, 4.0 * place + 10, 10) for place in range(num_places)])
    assert by_kernel(case, 0.4) == [[place % 2 == 0 for place in range(num_places)]]  # 6 / 14, then 2 / 18


def test_empty_boxes_suppress_nothing() -> None:
    assert by_kernel(one_segment((5, 5, 5, 5), (5, 5, 5, 5), (0, 0, 10, 10), (9, 9, 1, 1)), 0.0) == [[True] * 4]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 5)])
def test_nothing_filled_keeps_nothing(shape: tuple[int, int]) -> None:
    boxes = torch.full((*shape, 4), math.nan, device=DEVICE)
    kept = sorted_nms(boxes, torch.zeros(shape, dtype=torch.bool, device=DEVICE), 0.5)
    assert kept.shape == shape
    assert not kept.any()


def test_any_strides_will_do() -> None:
    case = random_case(3, 4, 30, side=12, filled=0.8, num_labels=2)
    strided = Case(*(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in case))
    assert by_kernel(strided, 0.5) == by_kernel(case, 0.5)


def test_what_does_not_fit_is_refused() -> None:
    boxes, valid = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"boxes must be float32 \(2, 3, 4\), got torch\.float64"):
        sorted_nms(boxes.double(), valid, 0.5)
    with pytest.raises(ValueError, match=r"boxes must be float32 \(2, 2, 4\)"):
        sorted_nms(boxes, valid[:, 1:], 0.5)
    with pytest.raises(ValueError, match=r"labels must be \(2, 3\) like valid, got \(3,\)"):
        sorted_nms(boxes, valid, 0.5, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"iou_threshold must be at least 0, got nan"):
        sorted_nms(boxes, valid, math.nan)


@pytest.mark.slow  # a compiler starts anew for each
@pytest.mark.parametrize(("with_labels", "num_places"), [(False, 1000), (True, 4096)])
def test_compiles_for_a_hopper(with_labels: bool, num_places: int, tmp_path: Path) -> None:
    pointers = {"boxes": "*fp32", "valid": "*i1", "labels": "*i64" if with_labels else "constexpr", "kept": "*i1"}
    numbers = {"listed": "*i32", "num_places": "i32", "limit": "i32", "threshold": "fp32"}
    ptx = compiled_ptx(
        "model.kernels.nms:sweep",
        pointers | numbers | {"PLACES": "constexpr", "BLOCK": "constexpr"},
        {"PLACES": 1 << (num_places - 1).bit_length(), "BLOCK": BLOCK} | ({} if with_labels else {"labels": None}),
        tmp_path,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    assert "div.rn.f32" in ptx
    assert "fma" not in ptx
    assert "div.full" not in ptx


@pytest.mark.gpu
def test_can_be_captured_in_a_graph() -> None:
    first = random_case(0, 8, 1000, side=200, filled=0.9, num_labels=3)
    second = random_case(1, 8, 1000, side=200, filled=0.5, num_labels=3)
    boxes, valid, labels = (tensor.cuda() for tensor in first)
    sorted_nms(boxes, valid, 0.5, labels=labels, limit=100)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = sorted_nms(boxes, valid, 0.5, labels=labels, limit=100)
    for held, new in zip((boxes, valid, labels), second, strict=True):
        held.copy_(new)
    graph.replay()
    assert kept.tolist() == by_kernel(second, 0.5, 100)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "iou_threshold", "limit"), [((80, 1000), 0.7, None), ((16, 4096), 0.5, 100)])
def test_agrees_at_full_size(shape: tuple[int, int], iou_threshold: float, limit: int | None) -> None:
    case = random_case(2, *shape, side=400, filled=0.9, num_labels=1 if limit is None else 80)
    kept = torch.tensor(by_segment_nms(case, iou_threshold))
    if limit is not None:
        kept &= kept.cumsum(dim=1) <= limit
    assert by_kernel(case, iou_threshold, limit) == kept.tolist()

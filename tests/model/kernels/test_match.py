"""The kernels that match boxes to ground truth: by hand and bit for bit as `model.matcher.match`; and they compile."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.matcher import NEGATIVE, NEITHER, POSITIVE, match
from tests.model.kernels.compiling import compiled_ptx

pytest.importorskip("triton")
from model.kernels.match import BLOCK, NUM_WARPS, match_boxes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_case(
    seed: int, num_images: int, num_boxes: int, num_places: int, *, side: int, shared: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes on the pixels of a small square, so with ties, with equal and with empty ones; some places are filled."""
    random = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        corner = torch.randint(side, (*shape, 2), generator=random)
        return torch.cat([corner, corner + torch.randint(side, (*shape, 2), generator=random)], dim=-1).float()

    gt_boxes, gt_valid = boxes(num_images, num_places), torch.rand(num_images, num_places, generator=random) < 0.7
    gt_boxes[~gt_valid] = torch.tensor([0, math.nan, math.inf, 1])
    return boxes(*([num_boxes] if shared else [num_images, num_boxes])), gt_boxes, gt_valid


def by_kernel(
    case: tuple[Tensor, Tensor, Tensor], bounds: tuple[float, float], low_quality: bool
) -> tuple[Tensor, Tensor]:
    """Index and label, after a comparison with what `match` finds."""
    boxes, gt_boxes, gt_valid = (tensor.to(DEVICE) for tensor in case)
    options: dict[str, Any] = {"negative_iou": bounds[0], "positive_iou": bounds[1], "allow_low_quality": low_quality}
    found = match_boxes(boxes, gt_boxes, gt_valid, **options)
    for ours, theirs in zip(found, match(boxes, gt_boxes, gt_valid, **options), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    return found


def test_by_hand() -> None:
    # Place 0 is not filled and place 2 has no area. Boxes 0 to 2 share 8, 5 and 2 tenths of the twins at places 1 and
    # 3; of place 4 boxes 3 and 4 each hold a twentieth, which is its most.
    gt_boxes = torch.tensor([[[0.0, 0, 8, 10], [0, 0, 10, 10], [0, 0, 0, 10], [0, 0, 10, 10], [20, 0, 40, 10]]])
    gt_valid = torch.tensor([[False, True, True, True, True]])
    boxes = torch.tensor([[0.0, 0, 8, 10], [0, 0, 5, 10], [0, 0, 2, 10], [20, 0, 21, 10], [39, 0, 40, 10]])
    gt_index, label = by_kernel((boxes, gt_boxes, gt_valid), (0.3, 0.7), False)
    assert gt_index.tolist() == [[1, 0, 0, 0, 0]]
    assert label.tolist() == [[POSITIVE, NEITHER, NEGATIVE, NEGATIVE, NEGATIVE]]
    gt_index, label = by_kernel((boxes, gt_boxes, gt_valid), (0.3, 0.7), True)
    assert gt_index.tolist() == [[1, 0, 0, 4, 4]]
    assert label.tolist() == [[POSITIVE, NEITHER, NEGATIVE, POSITIVE, POSITIVE]]


def test_ground_truth_that_no_box_touches_wins_all_that_do_not() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 2, 10], [50, 50, 60, 60]])
    gt_boxes = torch.tensor([[[0.0, 0, 10, 10], [100, 0, 110, 10]]]).repeat(2, 1, 1)
    gt_valid = torch.tensor([[True, True], [True, False]])
    gt_index, label = by_kernel((boxes, gt_boxes, gt_valid), (0.3, 0.7), True)
    assert label.tolist() == [[POSITIVE] * 3, [POSITIVE, NEGATIVE, NEGATIVE]]
    assert gt_index.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("tenths", range(1, 11))
def test_an_overlap_equal_to_a_bound_belongs_to_the_upper_side(tenths: int) -> None:
    # As float32, 0.7 and 0.9 are below the doubles, the others at or above; torch compares in float32.
    gt_boxes, gt_valid = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[True]])
    boxes = torch.tensor([[0.0, 0, 10, tenths], [0, 0, 10, tenths - 0.001]])
    _, label = by_kernel((boxes, gt_boxes, gt_valid), (tenths / 10, tenths / 10), False)
    assert label.tolist() == [[POSITIVE, NEGATIVE]]
    _, label = by_kernel((boxes, gt_boxes, gt_valid), (tenths / 10, 2.0), False)
    assert label.tolist() == [[NEITHER, NEGATIVE]]


def test_each_step_is_rounded() -> None:
    """Halves of boxes, whose IoU is 0.5 but for rounding: a product and a sum rounded once decide otherwise."""
    random = torch.Generator().manual_seed(0)
    corner, extent = torch.rand(2, 200, 2, generator=random).mul(1000).unbind()
    gt_boxes = torch.cat([corner, corner + extent], dim=1)[:, None]  # (200, 1, 4), each image has its own
    boxes = torch.cat([corner, corner + extent * torch.tensor([0.5, 1.0])], dim=1)[:, None]
    _, label = by_kernel((boxes, gt_boxes, torch.ones(200, 1, dtype=torch.bool)), (0.5, 0.5), False)
    assert 30 < int((label == POSITIVE).sum()) < 170  # both occur


def test_unions_below_the_normal_floats_are_raised_to_them() -> None:
    box = torch.tensor([[0.0, 0, 1e-20, 1e-20]])  # 1e-40 of the least normal float, 1.2e-38
    _, label = by_kernel((box, box[None], torch.tensor([[True]])), (0.005, 0.5), False)
    assert label.tolist() == [[NEITHER]]


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(0, 3),
    num_boxes=st.integers(0, 40),
    num_places=st.integers(0, 6),
    side=st.sampled_from([2, 5, 20]),
    shared=st.booleans(),
    bounds=st.sampled_from([(0.3, 0.7), (0.5, 0.5), (0.0, 0.1), (0.25, 1.0)]),
    low_quality=st.booleans(),
)
def test_agrees_with_match(
    seed: int,
    num_images: int,
    num_boxes: int,
    num_places: int,
    side: int,
    shared: bool,
    bounds: tuple[float, float],
    low_quality: bool,
) -> None:
    case = random_case(seed, num_images, num_boxes, num_places, side=side, shared=shared)
    by_kernel(case, bounds, low_quality)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_boxes", [BLOCK, 2 * BLOCK + 1])
def test_the_best_box_is_found_over_all_blocks(num_boxes: int, shared: bool) -> None:
    case = random_case(0, 2, num_boxes, 5, side=100, shared=shared)
    _, label = by_kernel(case, (0.8, 0.9), True)
    positive = (label == POSITIVE).sum(dim=1)
    assert 0 < int(positive.min()) <= int(positive.max()) < num_boxes


def test_tensors_in_another_order_in_memory_are_read() -> None:
    boxes, gt_boxes, gt_valid = random_case(1, 2, 30, 4, side=10)
    by_kernel(
        (boxes.mT.contiguous().mT, gt_boxes.flip(1).mT.contiguous().mT, gt_valid.T.contiguous().T), (0.3, 0.7), True
    )


def test_what_does_not_fit_is_refused() -> None:
    boxes, gt_boxes, gt_valid = random_case(0, 2, 3, 4, side=5)
    options: dict[str, Any] = {"negative_iou": 0.3, "positive_iou": 0.7, "allow_low_quality": True}
    with pytest.raises(ValueError, match=r"must be float32, got torch\.float64 and torch\.float32"):
        match_boxes(boxes.double(), gt_boxes, gt_valid, **options)
    with pytest.raises(ValueError, match=r"gt_boxes must be \(2, 3, 4\) like gt_valid, got \(2, 4, 4\)"):
        match_boxes(boxes, gt_boxes, gt_valid[:, 1:], **options)


@pytest.mark.slow  # a compiler starts anew for each
@pytest.mark.parametrize(("kernel", "with_most"), [("find_most", True), ("choose", True), ("choose", False)])
def test_compiles_for_hopper(kernel: str, with_most: bool, tmp_path: Path) -> None:
    signature = {"boxes": "*fp32", "gt_boxes": "*fp32", "gt_valid": "*i1", "most": "*i32" if with_most else "constexpr"}
    if kernel == "choose":
        signature |= {"gt_index": "*i64", "label": "*i8"}
    signature |= dict.fromkeys(["image_stride", "num_boxes", "num_places"], "i32")
    if kernel == "choose":
        signature |= {"positive_iou": "fp32", "negative_iou": "fp32"}
    ptx = compiled_ptx(
        f"model.kernels.match:{kernel}",
        signature,
        {} if with_most else {"most": None},
        tmp_path,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    assert "div.rn.f32" in ptx
    assert "fma" not in ptx
    assert "div.full" not in ptx
    assert "ftz" not in ptx

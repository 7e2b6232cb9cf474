"""Targets of the mask head in one launch, against torchvision's RoIAlign of one mask after the other and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

pytest.importorskip("triton")

from model.kernels.mask_crops import crop_masks, crop_packed
from model.mask_targets import PackedMasks, resized
from model.structures import ImageSize
from tests.model.kernels.compiling import compiled_ptx

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(9, 13), (20, 7), (1, 1)]
edge = st.one_of(st.integers(-4, 24).map(float), st.floats(-4, 24, width=32))
box = st.builds(lambda x, y, w, h: [x, y, x + w, y + h], edge, edge, *[st.one_of(st.just(0.0), st.floats(0, 20))] * 2)


def one_by_one(
    masks: list[Tensor], image_index: Tensor, gt_index: Tensor, boxes: Tensor, side: int, aligned: bool
) -> Tensor:
    cells = torch.zeros(len(boxes), side, side, device=DEVICE)
    for region, (image, place, some) in enumerate(zip(image_index.tolist(), gt_index.tolist(), boxes, strict=True)):
        mask = masks[image][place][None, None].float()
        cells[region] = roi_align(mask, [some[None]], side, sampling_ratio=0, aligned=aligned)[0, 0]
    return cells


@given(
    seed=st.integers(0, 2**32),
    counts=st.tuples(*[st.integers(0, 3)] * 3),
    boxes=st.lists(box, max_size=5),
    side=st.sampled_from([1, 7, 14]),
    aligned=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_cells_are_torchvisions(
    seed: int, counts: tuple[int, ...], boxes: list[list[float]], side: int, aligned: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = [
        torch.randint(0, 2, (count, *size), generator=generator, dtype=torch.uint8).to(DEVICE)
        for count, size in zip(counts, SIZES, strict=True)
    ]
    there = [(image, place) for image, count in enumerate(counts) for place in range(count)]
    boxes = boxes if there else []
    chosen = torch.tensor(there or [(0, 0)])[torch.randint(0, max(1, len(there)), (len(boxes),), generator=generator)]
    image_index, gt_index = chosen.to(DEVICE).unbind(1)
    places = torch.tensor(boxes, dtype=torch.float32, device=DEVICE).view(-1, 4)
    found = crop_masks(masks, image_index, gt_index, places, side=side, aligned=aligned)
    expected = one_by_one(masks, image_index, gt_index, places, side, aligned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@given(
    seed=st.integers(0, 2**32),
    counts=st.tuples(*[st.integers(0, 3)] * 3),
    to_sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=3, max_size=3),
    boxes=st.lists(box, max_size=5),
    aligned=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_of_packed_masks_they_are_those_of_the_masks_resized(
    seed: int, counts: tuple[int, ...], to_sizes: list[tuple[int, int]], boxes: list[list[float]], aligned: bool
) -> None:
    generator = np.random.default_rng(seed)
    of_images = [generator.random((count, *size)) < 0.5 for count, size in zip(counts, SIZES, strict=True)]
    bits = [np.packbits(one) for one in of_images]
    sizes = [(ImageSize(*size), ImageSize(*to_size)) for size, to_size in zip(SIZES, to_sizes, strict=True)]
    packed = PackedMasks(torch.from_numpy(np.concatenate(bits)).to(DEVICE), list(counts), sizes)
    there = [(image, place) for image, count in enumerate(counts) for place in range(count)]
    boxes = boxes if there else []
    chosen = generator.integers(0, max(1, len(there)), len(boxes))
    image_index, gt_index = torch.tensor(there or [(0, 0)], device=DEVICE)[chosen].unbind(1)
    places = torch.tensor(boxes, dtype=torch.float32, device=DEVICE).view(-1, 4)
    found = crop_packed(packed, image_index, gt_index, places, side=7, aligned=aligned)
    for one, (before, after), bitmaps in zip(of_images, sizes, packed.bitmaps, strict=True):
        assert torch.equal(bitmaps.cpu(), torch.as_tensor(resized(torch.from_numpy(one), before, after)))
    expected = crop_masks(packed.bitmaps, image_index, gt_index, places, side=7, aligned=aligned)
    assert torch.equal(found, expected)


def test_a_half_is_a_half() -> None:
    # Three of six columns and all of six rows are set: sums of thirds would fall short of it.
    mask = torch.zeros(1, 6, 6, dtype=torch.uint8, device=DEVICE)
    mask[:, :, 3:] = 1
    box = torch.tensor([[0.0, 0.0, 6.0, 6.0]], device=DEVICE)
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert crop_masks([mask], index, index, box, side=1, aligned=True).tolist() == [[[0.5]]]
    assert crop_masks([mask], index, index, box, side=2, aligned=True).tolist() == [[[0.0, 1.0], [0.0, 1.0]]]


def test_a_box_that_is_not_finite_makes_zeros() -> None:
    mask = torch.ones(1, 6, 6, dtype=torch.uint8, device=DEVICE)
    boxes = torch.tensor([[0.0, 0.0, torch.inf, 6.0], [torch.nan, 0.0, 6.0, 6.0]], device=DEVICE)
    index = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert not crop_masks([mask], index, index, boxes, side=2, aligned=False).any()


@pytest.mark.slow  # a compiler starts anew
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_for_hopper(packed: bool, tmp_path: Path) -> None:
    signature = {
        "bits": "*u8",
        "layout": "*i64",
        "image_index": "*i64",
        "gt_index": "*i64",
        "boxes": "*fp32",
        "cells": "*fp32",
    }
    constants = {"M": 28, "ALIGNED": False, "PACKED": packed, "CELLS": 32, "SAMPLES": 8}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled_ptx("model.kernels.mask_crops:average", signature, constants, tmp_path, enable_fp_fusion=True)

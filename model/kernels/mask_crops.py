"""What the mask head learns, on a GPU: bitmaps of a batch cut to its regions and brought to M × M cells, in one launch.

In: the masks of each image, the image, the mask and the box of each region. Out: the mean of each cell, as RoIAlign
(He et al. 2017 section 3) with as many samples as a cell has pixels takes it; rules at the borders are torchvision's.
"""

# N images, G masks of an image, R regions, M side of a target.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.roi_samples import axis, finite_box, neighbours
from model.mask_targets import PackedMasks
from model.transfers import to_device

_SAMPLES = 8
"""Along a row, of each cell, read together."""


def crop_masks(
    masks: Sequence[Tensor], image_index: Tensor, gt_index: Tensor, boxes: Tensor, *, side: int, aligned: bool
) -> Tensor:
    """(R, M, M) float32, M = `side`.

    Args:
        masks: of each image uint8 or bool (G, H, W), on the device of the boxes.
        image_index: int64 (R,) in ``0..N-1``.
        gt_index: int64 (R,) in ``0..G-1``.
        boxes: float32 (R, 4) in pixels of the masks; one that is not finite makes zeros.
        side: M.
        aligned: shifts by half a pixel and drops the rule that a box is at least one pixel wide.
    """
    ends = np.cumsum([0, *(one.numel() for one in masks)])
    layout = [[start, *one.shape[1:], *one.shape[1:]] for start, one in zip(ends, masks, strict=False)]
    return _crop(
        torch.cat([one.flatten() for one in masks]).view(torch.uint8),
        to_device(torch.tensor(layout), boxes.device),
        (image_index, gt_index, boxes),
        side=side,
        aligned=aligned,
        packed=False,
    )


def crop_packed(
    masks: PackedMasks, image_index: Tensor, gt_index: Tensor, boxes: Tensor, *, side: int, aligned: bool
) -> Tensor:
    """The same of masks that travelled, as if they were unpacked and brought to the size of the input: by the nearest
    pixel."""
    regions = (image_index, gt_index, boxes)
    return _crop(masks.bits, masks.layout, regions, side=side, aligned=aligned, packed=True)


def _crop(bits: Tensor, layout: Tensor, regions: Sequence[Tensor], *, side: int, aligned: bool, packed: bool) -> Tensor:
    image_index, gt_index, boxes = regions
    cells = torch.zeros(len(boxes), side, side, dtype=torch.float32, device=boxes.device)
    if cells.numel() == 0 or bits.numel() == 0:
        return cells
    average[(len(boxes), side)](
        bits,
        layout,
        image_index.contiguous(),
        gt_index.contiguous(),
        boxes.to(torch.float32).contiguous(),
        cells,
        M=side,
        ALIGNED=aligned,
        PACKED=packed,
        CELLS=triton.next_power_of_2(side),
        SAMPLES=_SAMPLES,
        num_warps=2,
        enable_fp_fusion=True,  # said because the default changes between releases
    )
    return cells


@triton.jit  # type: ignore[untyped-decorator]
def average(  # type: ignore[no-untyped-def]
    bits,
    layout,
    image_index,
    gt_index,
    boxes,
    cells,
    M: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    SAMPLES: tl.constexpr,  # noqa: N803
):
    """One row of cells of one region; `bits` holds a pixel in each byte, or eight where PACKED."""
    region, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image = tl.load(image_index + region)
    of_image = layout + 5 * image
    given_height, given_width = tl.load(of_image + 1), tl.load(of_image + 2)
    height, width = tl.load(of_image + 3).to(tl.int32), tl.load(of_image + 4).to(tl.int32)
    first_byte = bits + tl.load(of_image)
    first_pixel = tl.load(gt_index + region) * given_height * given_width
    x1, y1, x2, y2 = finite_box(boxes + 4 * region)
    of_rows, num_rows = _unshared(y1, y2, height, M, ALIGNED)
    of_columns, num_columns = _unshared(x1, x2, width, M, ALIGNED)
    cell, place = tl.arange(0, CELLS)[:, None], tl.arange(0, SAMPLES)[None, :]
    total = tl.zeros((CELLS, SAMPLES), tl.float32)
    for y_sample in range(num_rows):
        above, below, above_weight, below_weight = neighbours(row, y_sample, of_rows)
        for first in range(0, num_columns, SAMPLES):
            left, right, left_weight, right_weight = neighbours(cell, first + place, of_columns)
            there = (cell < M) & (first + place < num_columns)
            upper = first_pixel + _nearest(above, height, given_height) * given_width
            lower = first_pixel + _nearest(below, height, given_height) * given_width
            before, after = _nearest(left, width, given_width), _nearest(right, width, given_width)
            total += above_weight * left_weight * _pixel(first_byte, upper + before, there, PACKED)
            total += above_weight * right_weight * _pixel(first_byte, upper + after, there, PACKED)
            total += below_weight * left_weight * _pixel(first_byte, lower + before, there, PACKED)
            total += below_weight * right_weight * _pixel(first_byte, lower + after, there, PACKED)
    count = tl.maximum(num_rows * num_columns, 1).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, axis=1), tl.zeros((CELLS,), tl.float32) + count)
    column = tl.arange(0, CELLS)
    tl.store(cells + (region * M + row) * M + column, mean, mask=column < M)


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(place: tl.tensor, size: tl.tensor, given: tl.tensor) -> tl.tensor:
    """Which of `given` pixels each of `size` is nearest to, as torch's interpolation rounds it."""
    scale = tl.div_rn(given.to(tl.float32), size.to(tl.float32))
    return tl.minimum((place.to(tl.float32) * scale).to(tl.int64), given - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _pixel(first_byte: tl.tensor, pixel: tl.tensor, there: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:  # noqa: N803
    """float32 the bit or byte with the number `pixel`, 0 where it is not `there`."""
    if PACKED:
        byte = tl.load(first_byte + pixel // 8, mask=there, other=0).to(tl.int32)
        return ((byte >> (7 - pixel % 8).to(tl.int32)) & 1).to(tl.float32)
    return tl.load(first_byte + pixel, mask=there, other=0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _unshared(low: tl.tensor, high: tl.tensor, size: tl.tensor, M: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tuple:  # noqa: N803
    """An axis whose samples weigh one each, so that a half of ones is a half, and how many samples a cell has."""
    start, cell_size, step, samples, _share, _size = axis(low, high, size, 1.0, M, 0, ALIGNED)
    return (start, cell_size, step, samples, tl.full([], 1.0, tl.float32), size), samples

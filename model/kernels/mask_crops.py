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
    cells = torch.zeros(len(boxes), side, side, dtype=torch.float32, device=boxes.device)
    if cells.numel() == 0 or not any(one.numel() for one in masks):
        return cells
    bits = torch.cat([one.flatten() for one in masks])
    ends = np.cumsum([0, *(one.numel() for one in masks)])
    layout = torch.tensor([[start, *one.shape[1:]] for start, one in zip(ends, masks, strict=False)])  # (N, 3)
    if boxes.device.type == "cuda":
        layout = layout.pin_memory().to(boxes.device, non_blocking=True)
    average[(len(boxes), side)](
        bits.view(torch.uint8),
        layout,
        image_index.contiguous(),
        gt_index.contiguous(),
        boxes.to(torch.float32).contiguous(),
        cells,
        M=side,
        ALIGNED=aligned,
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
    CELLS: tl.constexpr,  # noqa: N803
    SAMPLES: tl.constexpr,  # noqa: N803
):
    """One row of cells of one region."""
    region, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image = tl.load(image_index + region)
    height, width = tl.load(layout + 3 * image + 1), tl.load(layout + 3 * image + 2)
    mask = bits + tl.load(layout + 3 * image) + tl.load(gt_index + region) * height * width
    x1, y1, x2, y2 = finite_box(boxes + 4 * region)
    of_rows, num_rows = _unshared(y1, y2, height.to(tl.int32), M, ALIGNED)
    of_columns, num_columns = _unshared(x1, x2, width.to(tl.int32), M, ALIGNED)
    cell, place = tl.arange(0, CELLS)[:, None], tl.arange(0, SAMPLES)[None, :]
    total = tl.zeros((CELLS, SAMPLES), tl.float32)
    for y_sample in range(num_rows):
        above, below, above_weight, below_weight = neighbours(row, y_sample, of_rows)
        for first in range(0, num_columns, SAMPLES):
            left, right, left_weight, right_weight = neighbours(cell, first + place, of_columns)
            there = (cell < M) & (first + place < num_columns)
            upper = mask + above.to(tl.int64) * width
            lower = mask + below.to(tl.int64) * width
            total += above_weight * left_weight * tl.load(upper + left, mask=there, other=0).to(tl.float32)
            total += above_weight * right_weight * tl.load(upper + right, mask=there, other=0).to(tl.float32)
            total += below_weight * left_weight * tl.load(lower + left, mask=there, other=0).to(tl.float32)
            total += below_weight * right_weight * tl.load(lower + right, mask=there, other=0).to(tl.float32)
    count = tl.maximum(num_rows * num_columns, 1).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, axis=1), tl.zeros((CELLS,), tl.float32) + count)
    column = tl.arange(0, CELLS)
    tl.store(cells + (region * M + row) * M + column, mean, mask=column < M)


@triton.jit  # type: ignore[untyped-decorator]
def _unshared(low: tl.tensor, high: tl.tensor, size: tl.tensor, M: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tuple:  # noqa: N803
    """An axis whose samples weigh one each, so that a half of ones is a half, and how many samples a cell has."""
    start, cell_size, step, samples, _share, _size = axis(low, high, size, 1.0, M, 0, ALIGNED)
    return (start, cell_size, step, samples, tl.full([], 1.0, tl.float32), size), samples

"""What the mask head learns: the ground truth mask of each region, cut to its box and brought to M × M cells.

In: the masks of the G instances of one image as bitmaps (G, H, W) uint8 or bool, as COCO's run lengths, or as polygons,
for each instance a list of parts (V, 2) of x, y in continuous coordinates, whose union the mask is. Out: cells in 0..1.
"""

# G instances, R regions, M mask side, E edges of an instance, P parts of an instance.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from model.boxes import full_precision
from model.kernels import run_kernels_on
from model.rle import decode
from model.structures import ImageSize, Rle
from model.transfers import to_device

Polygons = Sequence[Sequence[NDArray[np.floating[Any]]]]
"""Of each instance its parts, (V, 2) each."""
Masks = Tensor | Sequence[Rle] | Polygons
"""The masks of one image in one of the three forms."""


@dataclass(frozen=True, eq=False)
class PackedMasks:
    """Bitmaps of a batch of N images on a device, as they have travelled: a bit a pixel, of their images' own size."""

    bits: Tensor
    """(B,) uint8, the first pixel the highest bit; the bitmaps (G, H, W) of each image begin with a byte."""
    num_bitmaps: list[int]
    """G of each image."""
    sizes: list[tuple[ImageSize, ImageSize]]
    """Of each image, its own and the one it has in the input."""

    @cached_property
    def layout(self) -> Tensor:
        """(N, 5) int64 on the device: the first byte of each image, and its two sizes."""
        first_bytes = np.cumsum([0, *self._num_bytes()])
        rows = [[first, *size, *to_size] for first, (size, to_size) in zip(first_bytes, self.sizes, strict=False)]
        return to_device(torch.tensor(rows), self.bits.device)

    @cached_property
    def bitmaps(self) -> list[Tensor]:
        """(G, H, W) uint8 of each image, at the size it has in the input."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.bits.device)
        of_images = torch.split(self.bits, self._num_bytes())
        bitmaps = []
        for count, bits, (size, to_size) in zip(self.num_bitmaps, of_images, self.sizes, strict=True):
            unpacked = ((bits[:, None] >> shifts) & 1).flatten()[: count * math.prod(size)]
            bitmaps.append(cast(Tensor, resized(unpacked.view(-1, *size), size, to_size)))
        return bitmaps

    def _num_bytes(self) -> list[int]:
        """Of each image."""
        return [-(-count * math.prod(size) // 8) for count, (size, _) in zip(self.num_bitmaps, self.sizes, strict=True)]


MaskTarget = Literal["soft", "binary", "polygon"]
"""Cells as torchvision's: the bitmap averaged, and read half a pixel off; as detectron2's of bitmaps: averaged where it
is, and at least half; or as detectron2's of polygons: cells whose centre the outline holds."""

_CHUNK_PIXELS = 2**24
"""Pixels of bitmaps held as float32 at once, 64 MB."""
_CHUNK_CROSSINGS = 2**23
"""Edges times rows of cells held at once, 64 MB of float64."""
_OUTSIDE = -1e6
"""All four edges of a box that shall pool zeros."""
_MIN_SIDE = 0.1
"""Polygons are scaled into a box as if it were at least this wide and high, pixels (detectron2 masks.py)."""


@torch.no_grad()
def crop_of_images(
    masks: Sequence[Masks] | PackedMasks,
    image_index: Tensor,
    gt_index: Tensor,
    boxes: Tensor,
    *,
    side: int,
    target: MaskTarget,
) -> Tensor:
    """`crop` of regions that lie in the images `image_index` (R,), in rising order, each with masks of its own."""
    regions = (image_index, gt_index, boxes)
    if isinstance(masks, PackedMasks):
        from model.kernels.mask_crops import crop_packed

        _check_form(masks.bits, target)
        cells = crop_packed(masks, *regions, side=side, aligned=target == "binary")
    elif run_kernels_on(boxes.device) and all(isinstance(one, Tensor) and one.device == boxes.device for one in masks):
        from model.kernels.mask_crops import crop_masks

        for one in masks:
            _check_form(one, target)
        cells = crop_masks(cast(Sequence[Tensor], masks), *regions, side=side, aligned=target == "binary")
    else:
        return _crop_one_by_one(masks, *regions, side=side, target=target)
    return (cells >= 0.5).float() if target == "binary" else cells


def _crop_one_by_one(
    masks: Sequence[Masks], image_index: Tensor, gt_index: Tensor, boxes: Tensor, *, side: int, target: MaskTarget
) -> Tensor:
    images = torch.arange(len(masks), device=boxes.device)
    num_of_image: list[int] = (image_index == images[:, None]).sum(dim=1).tolist()
    of_images = zip(masks, torch.split(gt_index, num_of_image), torch.split(boxes, num_of_image), strict=True)
    return torch.cat([crop(one, index, some, side=side, target=target) for one, index, some in of_images])


@torch.no_grad()
def crop(masks: Masks, gt_index: Tensor, boxes: Tensor, *, side: int, target: MaskTarget) -> Tensor:
    """(R, M, M) float32 the mask of instance `gt_index` (R,) within each of `boxes` (R, 4), M = `side`."""
    _check_form(masks, target)
    cells = torch.zeros(len(boxes), side, side, dtype=torch.float32, device=boxes.device)
    if len(masks) == 0 or len(boxes) == 0:
        return cells
    if target == "polygon":
        return _crop_polygons(cast(Polygons, masks), gt_index, full_precision(boxes), cells)
    boxes = full_precision(boxes).float()
    for start, bitmaps in _chunks(cast(Tensor | Sequence[Rle], masks), boxes.device):
        # No region is picked out, for that the host would wait: those of other chunks pool zeros, from one sample.
        index = gt_index - start
        here = (index >= 0) & (index < len(bitmaps)) & boxes.isfinite().all(dim=1)
        rois = torch.cat([index.where(here, 0)[:, None].float(), boxes.where(here[:, None], _OUTSIDE)], dim=1)
        cells += roi_align(bitmaps[:, None].float(), rois, side, sampling_ratio=0, aligned=target == "binary")[:, 0]
    return (cells >= 0.5).float() if target == "binary" else cells


def resized(masks: Masks, from_size: ImageSize, to_size: ImageSize) -> Tensor | Polygons:
    """The masks of an image brought from one size to another; run lengths become bitmaps, by the nearest pixel."""
    if _form(masks) == "polygons":
        ratios = np.array([to_size.width / from_size.width, to_size.height / from_size.height])
        return [[part * ratios for part in parts] for parts in cast(Polygons, masks)]
    bitmaps = to_bitmaps(cast(Tensor | Sequence[Rle], masks))
    if tuple(bitmaps.shape[1:]) != tuple(from_size):
        raise ValueError(f"masks must have the size of their image {from_size}, got {tuple(bitmaps.shape[1:])}")
    if len(bitmaps) == 0:
        return bitmaps.new_zeros(0, *to_size)
    return _nearest(bitmaps, to_size)


def _nearest(bitmaps: Tensor, to_size: ImageSize) -> Tensor:
    """(G, *to_size) of (G, H, W), as F.interpolate has it, which on a CPU takes three times as long."""
    if bitmaps.device.type != "cpu":
        return F.interpolate(bitmaps[:, None], size=to_size, mode="nearest")[:, 0]
    rows, columns = (
        F.interpolate(torch.arange(before, dtype=torch.float32).expand(1, 1, -1), size=after, mode="nearest")[0, 0]
        for before, after in zip(bitmaps.shape[1:], to_size, strict=True)
    )
    resized = bitmaps.numpy().take(columns.numpy().astype(np.intp), axis=2).take(rows.numpy().astype(np.intp), axis=1)
    return torch.from_numpy(resized)


def flipped(masks: Masks, width: int) -> Tensor | Polygons:
    """The masks of an image mirrored left to right; run lengths become bitmaps."""
    if _form(masks) == "polygons":
        return [
            [np.stack([width - part[:, 0], part[:, 1]], axis=1) for part in parts] for parts in cast(Polygons, masks)
        ]
    bitmaps = to_bitmaps(cast(Tensor | Sequence[Rle], masks))
    if bitmaps.shape[2] != width:
        raise ValueError(f"masks must be as wide as their image, {width}, got {bitmaps.shape[2]}")
    return bitmaps.flip(2)


def to_bitmaps(masks: Tensor | Sequence[Rle]) -> Tensor:
    """(G, H, W) uint8."""
    if isinstance(masks, Tensor):
        return masks.to(torch.uint8)
    return torch.from_numpy(np.stack([decode(rle) for rle in masks]).astype(np.uint8))


def _form(masks: Masks) -> Literal["bitmaps", "run lengths", "polygons"]:
    """An empty list counts as polygons."""
    if isinstance(masks, Tensor):
        return "bitmaps"
    return "run lengths" if len(masks) > 0 and isinstance(masks[0], dict) else "polygons"


def _check_form(masks: Masks, target: MaskTarget) -> None:
    form = _form(masks)
    if target == "polygon" and form != "polygons":
        raise ValueError(f'mask target "polygon" needs polygons, got {form}; choose "soft" or "binary"')
    if target != "polygon" and form == "polygons" and len(masks) > 0:
        raise ValueError(
            f'mask target "{target}" needs bitmaps or run lengths, got polygons; draw them first '
            '(pycocotools.mask.frPyObjects, then merge) or choose "polygon"'
        )


def _chunks(masks: Tensor | Sequence[Rle], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """First instance and bitmaps of each part of at most _CHUNK_PIXELS."""
    height, width = masks.shape[1:] if isinstance(masks, Tensor) else masks[0]["size"]
    step = max(1, _CHUNK_PIXELS // max(1, height * width))
    for start in range(0, len(masks), step):
        yield start, to_bitmaps(masks[start : start + step]).to(device)


def _crop_polygons(polygons: Polygons, gt_index: Tensor, boxes: Tensor, cells: Tensor) -> Tensor:
    """Even-odd rule for each part, by scan lines: where a row of centres meets an edge, all cells to the right turn.

    A centre on a left or upper outline is inside, on a right or lower one outside. In double, as a centre may lie so
    near to an outline that its side depends on the order of operations.
    """
    side = cells.shape[-1]
    table, num_parts = _edge_table(polygons)
    edges, part = (torch.from_numpy(values).to(boxes.device) for values in table)  # (G, E, 4), (G, E)
    step = max(1, _CHUNK_CROSSINGS // max(1, part.shape[1] * side))
    for start in range(0, len(boxes), step):
        chosen = gt_index[start : start + step]  # (r,), r regions at a time
        column, crosses = _crossings(edges[chosen], boxes[start : start + step].double(), side)  # (r, E, M)
        row = torch.arange(side, device=boxes.device)
        line = (part[chosen][..., None] * side + row) * (side + 1) + column  # (r, E, M)
        turns = torch.zeros(len(chosen), num_parts * side * (side + 1), dtype=torch.int32, device=boxes.device)
        turns.scatter_add_(1, line.flatten(1), crosses.flatten(1).int())
        inside = turns.view(-1, num_parts, side, side + 1).cumsum(dim=3)[..., :side] % 2  # (r, P, M, M)
        cells[start : start + step] = inside.any(dim=1)
    return cells


def _crossings(edges: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(r, E, M) the first column whose centre is at or to the right of the edge, M if none is, in each row of centres,
    and whether the edge meets the row at all."""
    scale = side / (boxes[:, 2:] - boxes[:, :2]).clamp(min=_MIN_SIDE)  # (r, 2)
    corner = boxes[:, None, :2].repeat(1, 1, 2)  # (r, 1, 4)
    x1, y1, x2, y2 = ((edges - corner) * scale[:, None].repeat(1, 1, 2))[..., None].unbind(2)  # (r, E, 1)
    y = torch.arange(side, dtype=boxes.dtype, device=boxes.device) + 0.5  # (M,)
    crosses = (y1 <= y) != (y2 <= y)  # (r, E, M)
    x = x1 + (y - y1) * ((x2 - x1) / (y2 - y1).where(y1 != y2, 1.0))
    crosses &= x.isfinite()
    return (x.where(crosses, 0.0) - 0.5).ceil().clamp(0, side).to(torch.int64), crosses


def _edge_table(polygons: Polygons) -> tuple[tuple[NDArray[np.float64], NDArray[np.int64]], int]:
    """Edges (G, E, 4) x1 y1 x2 y2 and the part (G, E) each belongs to, filled up with edges no row meets; and P."""
    num_edges = [sum(len(part) for part in parts) for parts in polygons]
    edges = np.zeros((len(polygons), max(num_edges), 4))
    part_index = np.zeros(edges.shape[:2], np.int64)
    for row, index, parts, count in zip(edges, part_index, polygons, num_edges, strict=True):
        if count > 0:
            row[:count] = np.concatenate([np.hstack([part, np.roll(part, -1, axis=0)]) for part in parts])
            index[:count] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return (edges, part_index), max(1, *(len(parts) for parts in polygons))

"""Keypoints from heatmaps (He et al. 2017): logits over a region's cells enter, places in the input's frame leave.

A heatmap is brought to its box's size in whole pixels, and the keypoint is the middle of the largest pixel. Bicubic
interpolation is one matrix for the rows and one for the columns, so regions of about one size take two products
together. The host must know those sizes; it waits for them, once a call, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# R regions, K keypoints, S side of the heatmaps, H × W the largest box of a chunk in whole pixels.

CUBIC = -0.75
"""The free parameter of cubic convolution (Keys 1981): torch's."""

CHUNK_VALUES = 2**25
"""Values of interpolated maps held at once, unless one region alone has more: 17 keypoints of 1,333² pixels come to
30 million."""

_KINDS_PER_OCTAVE = 2
"""Boxes go together whose sides lie between the same two of so many steps to the double ..."""
_SMALL_SIDE = 16.0
"""... and all sides up to this many pixels do."""


@torch.no_grad()
def decode_heatmaps(heatmaps: Tensor, boxes: Tensor, *, score: Literal["logit", "softmax"]) -> Tensor:
    """(R, K, 3) float32 x, y and score of the keypoints in heatmaps (R, K, S, S) that lie over boxes (R, 4).

    The score is the logit there or, as detectron2's, e to that logit over the sum of e to the heatmap's logits. Of
    equal pixels the first wins, row by row.
    """
    heatmaps, boxes = heatmaps.float(), boxes.float()
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)  # (R, 2) width, height
    pixels = sides.ceil()
    with torch.autocast(heatmaps.device.type, enabled=False):
        logits, places = _peaks(heatmaps, pixels)  # (R, K), (R, K, 2)
    places = (places + 0.5) * (sides / pixels)[:, None] + boxes[:, None, :2]
    scores = logits if score == "logit" else (logits - heatmaps.flatten(2).logsumexp(dim=2)).exp()
    return torch.cat([places, scores[..., None]], dim=2)


def _peaks(heatmaps: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value (R, K) of each heatmap over `pixels` (R, 2) width and height, and its x and y (R, K, 2)."""
    num_regions, num_keypoints, *sides = heatmaps.shape
    values = heatmaps.new_zeros(num_regions, num_keypoints)
    places = heatmaps.new_zeros(num_regions, num_keypoints, 2)
    for chunk, width, height in _chunks(pixels, num_keypoints=num_keypoints):
        rows = _cubic_matrix(pixels[chunk, 1], height, sides[0])  # (R, H, S + 4)
        columns = _cubic_matrix(pixels[chunk, 0], width, sides[1])  # (R, W, S + 4)
        maps = F.pad(heatmaps[chunk], (2, 2, 2, 2), mode="replicate")  # (R, K, S + 4, S + 4)
        maps = torch.einsum("rhs,rkst->rkht", rows, maps)  # (R, K, H, S + 4)
        maps = (maps.flatten(1, 2) @ columns.mT).view(len(chunk), num_keypoints, height, width)  # (R, K, H, W)
        values[chunk], place = _largest(maps)
        # past a box's last row and column there are copies of them
        places[chunk] = torch.minimum(place, pixels[chunk, None] - 1)
    return values, places


def _chunks(pixels: Tensor, *, num_keypoints: int) -> Iterator[tuple[Tensor, int, int]]:
    """Indices of regions of about one size, and the largest width and height among them."""
    if len(pixels) == 0:
        return
    sizes = pixels.cpu()  # (R, 2) the host waits here
    if not sizes.isfinite().all():
        raise ValueError("the boxes of keypoints must be finite; leave others out")
    kinds = (sizes.clamp(min=_SMALL_SIDE).log2() * _KINDS_PER_OCTAVE).ceil()
    _, kind, counts = torch.unique(kinds, dim=0, return_inverse=True, return_counts=True)
    order = kind.argsort(stable=True)
    for group, on_device in zip(
        torch.split(order, counts.tolist()), torch.split(order.to(pixels.device), counts.tolist()), strict=True
    ):
        width, height = map(int, sizes[group].amax(dim=0).tolist())
        for chunk in torch.split(on_device, max(1, CHUNK_VALUES // (num_keypoints * width * height))):
            yield chunk, width, height


def _cubic_matrix(num_pixels: Tensor, length: int, side: int) -> Tensor:
    """(R, length, side + 4) what each of a region's pixels takes of the cells -2 to side + 1.

    `num_pixels` (R,) are as long as their boxes; pixels from there to `length` are copies of the last.
    """
    pixel = torch.arange(length, dtype=num_pixels.dtype, device=num_pixels.device)
    pixel = torch.minimum(pixel, num_pixels[:, None] - 1)  # (R, length)
    position = (side / num_pixels)[:, None] * (pixel + 0.5) - 0.5
    cell = position.floor()
    taps = torch.arange(-1, 3, device=pixel.device)
    weights = _cubic(((position - cell)[..., None] - taps).abs())  # (R, length, 4)
    matrix = weights.new_zeros(*cell.shape, side + 4)
    return matrix.scatter_(2, cell.long()[..., None] + taps + 2, weights)


def _cubic(distance: Tensor) -> Tensor:
    """The weight of a cell at a distance of 0 to 2."""
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
    return near.where(distance <= 1, far)


def _largest(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) the largest value of maps (R, K, H, W), and (R, K, 2) x and y of the first place that has it."""
    of_rows = maps.amax(dim=3)  # (R, K, H)
    y = of_rows.argmax(dim=2, keepdim=True)  # (R, K, 1)
    row = maps.gather(2, y[..., None].expand(-1, -1, -1, maps.shape[3]))[:, :, 0]  # (R, K, W)
    x = row.argmax(dim=2, keepdim=True)  # (R, K, 1)
    return of_rows.gather(2, y)[..., 0], torch.cat([x, y], dim=2)

"""3×3 convolution at stride 1 by Winograd's F(4×4, 3×3) (Lavin & Gray 2015), in float32 on a CPU.

Maps enter and leave, channels-last. Four by four outputs cost 36 products of matrices where the plain sum takes 144;
what is gained goes in part to the transforms before and after, which are matrix products too. Rounding is about four
times the plain sum's: some 10⁻⁵ of the largest output.
"""

# N images, C channels, K outputs; H × W a map, in tiles of 4 × 4.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TILE = 4
"""Outputs of a tile along an axis."""
POINTS = 6
"""Inputs of a tile along an axis, and the points its polynomials are multiplied at: 0, ±1, ±2 and infinity."""

CHANNELS = range(192, 385)
"""Measured with 256; with 128 the transforms cost what they spare."""
MIN_TILES = 100
"""Of a whole batch of maps: below, the products are too small."""
MIN_FILLED = 0.7
"""Share of the tiles' cells that must lie on the map."""
BLOCK_TILES = 450
"""Computed at once: enough for fast products, few enough that a block stays in the cache between the passes."""

_INPUT = torch.tensor(
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)
_OUTPUT = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def can_transform(conv: nn.Conv2d) -> bool:
    """Whether `conv` is one that this may be the faster form of."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.in_channels in CHANNELS
        and conv.out_channels in CHANNELS
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    )


def pays(shape: torch.Size) -> bool:
    """Whether maps (N, C, H, W) are so many and so large that it is the faster form."""
    num_images, _, height, width = shape
    tiles = num_images * _tiles(height) * _tiles(width)
    return tiles >= MIN_TILES and num_images * height * width >= MIN_FILLED * tiles * TILE**2


def transformed(weight: Tensor) -> Tensor:
    """(6, 6, C, K) float32 of (K, C, 3, 3)."""
    in_double = torch.einsum("ip,jq,kcpq->ijck", _KERNEL, _KERNEL, weight.detach().double())
    return in_double.float().contiguous()


def winograd_conv(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
    """(N, K, H, W) float32 of x (N, C, H, W) in any dtype, padded by one; `weight` is `transformed`. No gradients."""
    num_images, channels, height, width = x.shape
    outputs = weight.shape[3]
    rows, columns = _tiles(height), _tiles(width)
    images_at_once = max(1, min(num_images, BLOCK_TILES // (rows * columns)))
    rows_at_once = rows
    if images_at_once == 1:
        rows = -(-height // TILE)
        rows_at_once = -(-rows // -(-rows * columns // BLOCK_TILES))  # in blocks as equal as can be
    scratch = _Scratch(images_at_once * rows_at_once * columns, columns, channels, outputs)
    y = torch.empty(
        (num_images, outputs, height, width), dtype=torch.float32, memory_format=torch.channels_last, device=x.device
    )
    cells, out = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)  # (N, H, W, C), (N, H, W, K)
    for image in range(0, num_images, images_at_once):
        images = slice(image, image + images_at_once)
        for row in range(0, rows, rows_at_once):
            num_rows = min(rows_at_once, rows - row)
            _lay_out(cells[images], scratch, row, num_rows)
            block = _products(scratch, weight, len(cells[images]) * num_rows, columns)  # (Σ rows, 4, W', K)
            lines = block.view(len(cells[images]), num_rows * TILE, -1, outputs)
            part = out[images, row * TILE : (row + num_rows) * TILE]
            torch.add(lines[:, : part.shape[1], :width], bias, out=part)
            if relu:
                part.relu_()
    return y


class _Scratch:
    """Memory of one block of T tiles, which is used again for each."""

    def __init__(self, num_tiles: int, columns: int, channels: int, outputs: int) -> None:
        line = columns * TILE * channels
        # Two lines and two cells are read behind the last ones.
        self.padded = torch.zeros(num_tiles // columns * TILE * line + 2 * line)
        self.columns_done = torch.zeros((num_tiles * POINTS * TILE + 2) * channels)
        self.points = torch.empty(num_tiles * POINTS**2 * channels)
        self.products = torch.empty(num_tiles * POINTS**2 * outputs)
        self.rows_done = torch.empty(num_tiles * TILE * POINTS * outputs)
        self.block = torch.empty(num_tiles * TILE**2 * outputs)


def _lay_out(cells: Tensor, scratch: _Scratch, row: int, num_rows: int) -> None:
    """The inputs of some rows of tiles of each image (n, H, W, C), in lines of whole tiles with zeros around the map.

    Images and lines follow each other without gaps: a tile that ends beside the map reads what comes next, which its
    outputs on the map do not hang on.
    """
    num_images, height, width, channels = cells.shape
    num_lines = num_rows * TILE + (2 if num_images == 1 else 0)
    lines = _take(scratch.padded, num_images, num_lines, _tiles(width) * TILE, channels)
    first = row * TILE - 1
    low, high = max(first, 0), min(first + num_rows * TILE + 2, height)
    lines[:, : low - first] = 0
    lines[:, low - first : high - first, 1 : width + 1] = cells[:, low:high]
    lines[:, high - first :] = 0


def _products(scratch: _Scratch, weight: Tensor, num_rows: int, columns: int) -> Tensor:
    """(R, 4, 4 L, K) the outputs of R rows of L tiles, T in all, without bias."""
    channels, outputs = weight.shape[2:]
    tiles, line = num_rows * columns, columns * TILE * channels
    overlapping = scratch.padded.as_strided((num_rows, POINTS, line), (TILE * line, line, 1))
    columns_done = _take(scratch.columns_done, POINTS, num_rows, line)
    torch.bmm(_INPUT.expand(num_rows, -1, -1), overlapping, out=columns_done.transpose(0, 1))
    overlapping = scratch.columns_done.as_strided((POINTS * tiles, POINTS, channels), (TILE * channels, channels, 1))
    points = _take(scratch.points, POINTS, tiles, POINTS, channels)
    torch.bmm(_INPUT.expand(POINTS * tiles, -1, -1), overlapping, out=points.view(-1, POINTS, channels))

    products = _take(scratch.products, POINTS, tiles, POINTS, outputs)
    for one, weights, product in zip(points, weight, products, strict=True):
        torch.bmm(one.transpose(0, 1), weights, out=product.transpose(0, 1))

    rows_done = _take(scratch.rows_done, num_rows, TILE, columns * POINTS * outputs)
    torch.bmm(_OUTPUT.expand(num_rows, -1, -1), products.view(POINTS, num_rows, -1).transpose(0, 1), out=rows_done)
    block = _take(scratch.block, num_rows * TILE * columns, TILE, outputs)
    rows_done = rows_done.view(-1, POINTS, outputs)
    return torch.bmm(_OUTPUT.expand(len(rows_done), -1, -1), rows_done, out=block).view(num_rows, TILE, -1, outputs)


def _tiles(side: int) -> int:
    """Along an axis, of a map with its two lines of padding."""
    return -(-(side + 2) // TILE)


def _take(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)

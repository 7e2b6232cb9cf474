"""3×3 convolution at stride 1 by Winograd's F(m×m, 3×3) (Lavin & Gray 2015), in float32 on a CPU.

Maps enter and leave, channels-last. A tile of m × m outputs costs (m + 2)² products where the plain sum takes 9 m²;
some of what is gained goes to the transforms before and after, which are products of small matrices. A larger tile is
the faster and rounds more: outputs that spread by one are off by 4·10⁻⁶ (root mean square) with tiles of 6, by 2·10⁻⁵
with those of 7.

What is not finite spreads to the other outputs of its tile and, at the left border, to the last tile of the row before.
"""

# N images, C channels, K outputs; H × W a map; m outputs of a tile along an axis, P = m + 2 points of it. Of a block:
# n images, R rows of tiles in all of them, B windows that are transformed at once, L tiles of a window.

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.fused_conv import can_fuse_on_cpu, onednn, onednn_conv

TILE, POOLED_TILE = 6, 7
"""Outputs of a tile along an axis: of most maps, and of those that heads pool, which a tile of 7 fits."""
POOLED_SIDES = (7, 14)
CHANNELS = range(96, 385)
"""With fewer the transforms cost what the products spare; with 512 the weight of a layer takes 85 MB."""
MIN_TILES = 20
"""Of a whole batch of maps: below, the products are too small."""
BLOCK_TILES = 450
"""Computed at once: enough for fast products, few enough that what passes from one to the next stays in the cache."""

_POINTS = {
    5: (1 / 3, -1 / 3, 4 / 5, -4 / 5, 5 / 3, -5 / 3),
    6: (0, 1, -1, 2, -2, 1 / 2, -1 / 2),
    7: (0, 1, -1, 1 / 2, -1 / 2, 4 / 3, -4 / 3, 3),
}
"""Of each tile, and infinity: of those tried the ones that round least."""
_ONE = 1
"""Which of them is 1, where a constant is one everywhere: what is added to its products is added to all outputs."""


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether it is a 3×3 convolution at stride 1, padded by one, of all channels."""
    return conv.kernel_size == (3, 3) and conv.stride == conv.padding == conv.dilation == (1, 1) and conv.groups == 1


def can_transform(conv: nn.Conv2d) -> bool:
    """Whether `conv` is one that this may be the faster form of."""
    return (
        is_plain(conv)
        and conv.in_channels in CHANNELS
        and conv.out_channels in CHANNELS
        and can_fuse_on_cpu(torch.float32)
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    )


class Winograd:
    """A 3×3 convolution at stride 1, padded by one. No gradients."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        self._layouts: dict[tuple[int, int], bytes] = {}
        self._weights: dict[bytes, list[Tensor]] = {}

    def pays(self, shape: torch.Size) -> bool:
        """Whether maps (N, C, H, W) are so many and so large that it is the faster form."""
        num_images, _, height, width = shape
        tile = tile_of(height, width)
        return num_images * _tiles(height, tile) * _tiles(width, tile) >= MIN_TILES

    def __call__(self, x: Tensor, plus: Tensor | None, *, relu: bool) -> Tensor:
        """``relu(conv(x) + plus)``, (N, K, H, W) float32; the ReLU and the sum where asked for; x in any dtype.

        Few and small maps are left to the plain sum, which may overwrite `plus`.
        """
        if not self.pays(x.shape):
            return onednn_conv(self.conv, x, plus, relu=relu)
        num_images, _, height, width = x.shape
        tile = tile_of(height, width)
        cells = x.permute(0, 2, 3, 1).contiguous()  # (N, H, W, C)
        out = cells.new_empty(num_images, height, width, self.conv.out_channels, dtype=torch.float32)
        rows, tiles = _tiles(height, tile), _tiles(height, tile) * _tiles(width, tile)
        images_at_once = max(1, min(num_images, BLOCK_TILES // tiles))
        rows_at_once = -(-rows // -(-tiles // BLOCK_TILES))  # of a large map, in blocks as equal as can be
        memory = _Memory(images_at_once * rows_at_once, width, tile, self.conv)
        for image in range(0, num_images, images_at_once):
            images = slice(image, image + images_at_once)
            for row in range(0, rows, rows_at_once):
                block = range(row, min(row + rows_at_once, rows))
                _transform_columns(cells[images], block, memory)
                self._multiply(memory, len(block) * len(cells[images]))
                _restore_columns(out[images], block, memory)
                done = slice(row * tile, (row + rows_at_once) * tile)
                if plus is not None:
                    out[images, done] += plus.permute(0, 2, 3, 1)[images, done]
                if relu:
                    out[images, done].relu_()
        return out.permute(0, 3, 1, 2)

    def _multiply(self, memory: _Memory, num_rows: int) -> None:
        """From transformed columns of inputs to those of outputs: at each of their points the lines are transformed,
        multiplied and restored."""
        conv, points = self.conv, memory.tile + 2
        num_windows = num_rows * memory.windows_of_row
        bias = conv.weight.new_zeros(points, conv.out_channels, dtype=torch.float32)
        if conv.bias is not None:
            bias[_ONE] = conv.bias
        before, after = (matrix.expand(num_windows, -1, -1) for matrix in (memory.before, memory.after))
        inputs, outputs = memory.columns_in(num_rows), memory.columns_out(num_rows)
        factors = memory.factors(num_windows)  # (B, L P, C)
        maps = factors.view(1, 1, -1, points * conv.in_channels).permute(0, 3, 1, 2)  # (1, P C, 1, B L)
        for point, weight in enumerate(self._packed(memory.tile, maps.shape[3])):
            torch.bmm(before, memory.windows(inputs[point]), out=factors)
            products = onednn(maps, weight, bias.flatten() if point == _ONE else None, groups=points, relu=False)
            products = products.permute(0, 2, 3, 1).view(num_windows, -1, conv.out_channels)  # (B, L P, K)
            torch.bmm(after, products, out=outputs[point].view(num_windows, -1, conv.out_channels))  # (B, L m, K)

    def _packed(self, tile: int, num_tiles: int) -> list[Tensor]:
        """For each point of a column, weights (P K, C, 1, 1) of P groups, in the layout that oneDNN chooses for
        products of so many tiles: in another they would be laid out anew each time, which can take ten times as long.
        """
        points, channels, outputs = tile + 2, self.conv.in_channels, self.conv.out_channels
        shape = ((0, 0), (1, 1), (1, 1), points, [1, points * channels, 1, num_tiles])
        pack = torch.ops.mkldnn._reorder_convolution_weight
        if (tile, num_tiles) not in self._layouts:
            any_weight = self.conv.weight.new_empty(points * outputs, channels, 1, 1, dtype=torch.float32)
            layout = torch.ops.mkldnn._get_mkldnn_serialized_md(pack(any_weight, *shape))
            self._layouts[tile, num_tiles] = layout.numpy().tobytes()
        layout = self._layouts[tile, num_tiles]
        if layout not in self._weights:
            of_kernel = transforms(tile).of_kernel
            weights = torch.einsum("ip,jq,kcpq->ijkc", of_kernel, of_kernel, self.conv.weight.double())
            weights = weights.float().contiguous().view(points, -1, channels, 1, 1)
            self._weights[layout] = [pack(weight, *shape) for weight in weights]
        return self._weights[layout]


def tile_of(height: int, width: int) -> int:
    """Outputs along an axis of a map's tiles."""
    return POOLED_TILE if height in POOLED_SIDES and width in POOLED_SIDES else TILE


class Transforms(NamedTuple):
    """Of F(m, 3) along an axis: ``of_outputs @ ((of_kernel @ kernel) * (of_inputs @ inputs))``, in float64."""

    of_inputs: Tensor
    """(P, P)"""
    of_kernel: Tensor
    """(P, 3)"""
    of_outputs: Tensor
    """(m, P)"""


@functools.cache
def transforms(tile: int) -> Transforms:
    """By Toom and Cook: P values determine the product of two polynomials, and a filter is such a product turned about.

    So what leads from values to coefficients comes first here, on the inputs.
    """
    finite = torch.tensor(_POINTS[tile], dtype=torch.float64)

    def values(num_coefficients: int) -> Tensor:
        at_infinity = torch.eye(num_coefficients, dtype=torch.float64)[-1:]
        return torch.cat([finite[:, None] ** torch.arange(num_coefficients), at_infinity])  # (P, num_coefficients)

    of_inputs = torch.linalg.inv(values(tile + 2)).T
    # Divided by its leading coefficient, a row needs few bits where the points do: rounding it costs less.
    leading = torch.cat([of_inputs[:-1, -2], of_inputs[-1:, -1]])[:, None]
    return Transforms(of_inputs / leading, values(3) * leading, values(tile).T)


@functools.lru_cache(maxsize=64)
def _side_by_side(tile: int, count: int) -> tuple[Tensor, Tensor]:
    """(L P, L m + 2) and (L m, L P) float32, what transforms inputs and outputs of L = `count` tiles."""
    of_inputs, _, of_outputs = transforms(tile)
    points = tile + 2
    before, after = torch.zeros(count * points, count * tile + 2), torch.zeros(count * tile, count * points)
    for index in range(count):
        here = slice(index * points, (index + 1) * points)
        before[here, index * tile : index * tile + points] = of_inputs
        after[index * tile : (index + 1) * tile, here] = of_outputs
    return before, after


def _along(side: int, tile: int) -> tuple[Tensor, Tensor]:
    """(L P, side) and (side, L P), the same for an axis of a map, without what lies beside it."""
    before, after = _side_by_side(tile, _tiles(side, tile))
    return before[:, 1 : side + 1], after[:side]


class _Memory:
    """What is between the passes over a block; it serves one block after the other."""

    def __init__(self, num_rows: int, width: int, tile: int, conv: nn.Conv2d) -> None:
        self.tile, self.width = tile, width
        self.channels, self.outputs = conv.in_channels, conv.out_channels
        if width in POOLED_SIDES:  # windows are whole lines of the map
            self.before, self.after = _along(width, tile)
            self.lead, self.step, self.windows_of_row = 0, width, 1
        else:  # windows are the inputs of a tile, of lines with zeros before and behind, and overlap
            self.before, self.after = _side_by_side(tile, 1)
            self.lead, self.step, self.windows_of_row = 1, tile, _tiles(width + 1, tile)
        self.line = self.step * self.windows_of_row
        cells = (tile + 2) * num_rows * self.line
        like = conv.weight.new_empty(0, dtype=torch.float32)
        self._columns_in = like.new_zeros((cells + tile + 2) * self.channels)  # the last window ends behind its line
        self._columns_out = like.new_empty(cells * self.outputs)
        self._factors = like.new_empty(num_rows * self.windows_of_row * len(self.before) * self.channels)

    def columns_in(self, num_rows: int) -> Tensor:
        """(P, R, line, C); of each line the cells from `lead` on are the map's, the others always zero."""
        return _take(self._columns_in, self.tile + 2, num_rows, self.line, self.channels)

    def columns_out(self, num_rows: int) -> Tensor:
        """(P, R, line, K); of each line the first cells are the map's."""
        return _take(self._columns_out, self.tile + 2, num_rows, self.line, self.outputs)

    def windows(self, lines: Tensor) -> Tensor:
        """(B, window, C) of lines (R, line, C)."""
        shape = (len(lines) * self.windows_of_row, self.before.shape[1], self.channels)
        return lines.as_strided(shape, (self.step * self.channels, self.channels, 1))

    def factors(self, num_windows: int) -> Tensor:
        """(B, L P, C) of the products."""
        return _take(self._factors, num_windows, len(self.before), self.channels)


def _transform_columns(cells: Tensor, block: range, memory: _Memory) -> None:
    """Of rows of tiles of each image (n, H, W, C); what lies above and below the map is left out of the products."""
    num_images, height, width, channels = cells.shape
    tile, points = memory.tile, memory.tile + 2
    before, _ = _along(height, tile)
    columns = memory.columns_in(num_images * len(block)).view(points, num_images, len(block), -1, channels)
    columns = columns[:, :, :, memory.lead : memory.lead + width]
    for index, row in enumerate(block):
        low, high = max(row * tile - 1, 0), min((row + 1) * tile + 1, height)
        matrix = before[row * points : (row + 1) * points, low:high].expand(num_images, -1, -1)
        inputs = cells[:, low:high].float().view(num_images, high - low, width * channels)
        into = columns[:, :, index].view(points, num_images, width * channels).transpose(0, 1)
        torch.bmm(matrix, inputs, out=into)


def _restore_columns(out: Tensor, block: range, memory: _Memory) -> None:
    """The outputs of rows of tiles of each image (n, H, W, K)."""
    num_images, height, width, outputs = out.shape
    tile, points = memory.tile, memory.tile + 2
    _, after = _along(height, tile)
    columns = memory.columns_out(num_images * len(block)).view(points, num_images, len(block), -1, outputs)
    for index, row in enumerate(block):
        low, high = row * tile, min((row + 1) * tile, height)
        matrix = after[low:high, row * points : (row + 1) * points].expand(num_images, -1, -1)
        products = columns[:, :, index, :width].view(points, num_images, width * outputs).transpose(0, 1)
        torch.bmm(matrix, products, out=out[:, low:high].view(num_images, high - low, width * outputs))


def _tiles(side: int, tile: int) -> int:
    return -(-side // tile)


def _take(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)

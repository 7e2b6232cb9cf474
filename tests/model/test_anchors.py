from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from model.anchors import anchors_at, anchors_of, cell_anchors, cell_strides
from model.config import R50_C4, R50_FPN
from model.recipe import Recipe
from model.structures import ImageSize
from tests.reference import anchors as reference

RATIOS = (0.5, 1.0, 2.0)


def test_rounded_anchors_by_hand() -> None:
    # height over width 0.5: 32·√2 = 45.25 wide, half of it 22.63 → 23; 32/√2 = 22.63 high, half of it 11.31 → 11
    expected = [[-23.0, -11.0, 23.0, 11.0], [-16.0, -16.0, 16.0, 16.0], [-11.0, -23.0, 11.0, 23.0]]
    assert cell_anchors(32, RATIOS, rounded=True).tolist() == expected


def test_anchors_not_rounded_have_the_area_and_ratio_asked_for() -> None:
    x1, y1, x2, y2 = cell_anchors(64, RATIOS, rounded=False).unbind(1)
    torch.testing.assert_close((x2 - x1) * (y2 - y1), torch.full((3,), 64.0**2))
    torch.testing.assert_close((y2 - y1) / (x2 - x1), torch.tensor(RATIOS))
    assert math.isclose(float(x2[0]), 22.627 * 2, abs_tol=1e-2)


def test_anchors_agree_with_the_loop() -> None:
    grid, stride = ImageSize(3, 4), ImageSize(61, 64)
    index = torch.arange(grid.height * grid.width * len(RATIOS))
    found = anchors_at(index, cell_anchors(512, RATIOS, rounded=False), grid=grid, stride=stride)
    expected = [
        reference.anchor(512, ratio, y, x, stride)
        for y in range(grid.height)
        for x in range(grid.width)
        for ratio in RATIOS
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("size", [ImageSize(800, 1088), ImageSize(1344, 800), ImageSize(32, 64)])
def test_anchors_are_torchvisions_bit_for_bit(size: ImageSize) -> None:
    grids = [ImageSize(size.height // stride, size.width // stride) for stride in (4, 8, 16, 32)]
    grids.append(ImageSize(-(-size.height // 64), -(-size.width // 64)))
    generator = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), (RATIOS,) * 5)
    (theirs,) = generator(ImageList(torch.zeros(1, 3, *size), [size]), [torch.zeros(1, 1, *grid) for grid in grids])
    ours = [
        anchors_at(
            torch.arange(grid.height * grid.width * 3),
            cell_anchors(side, RATIOS, rounded=True),
            grid=grid,
            stride=cell_strides(size, [grid], rule="fitted")[0],
        )
        for grid, side in zip(grids, (32, 64, 128, 256, 512), strict=True)
    ]
    assert torch.equal(torch.cat(ours), theirs)


def test_stride_of_a_level_that_does_not_divide() -> None:
    grids = [ImageSize(200 >> level, 272 >> level) for level in range(4)] + [ImageSize(13, 17)]
    fitted = cell_strides(ImageSize(800, 1088), grids, rule="fitted")
    assert fitted == [ImageSize(4, 4), ImageSize(8, 8), ImageSize(16, 16), ImageSize(32, 32), ImageSize(61, 64)]
    assert cell_strides(ImageSize(800, 1088), grids, rule="fixed") == [*fitted[:4], ImageSize(64, 64)]
    assert cell_strides(ImageSize(800, 1088), grids[2:3], rule="fixed") == [ImageSize(16, 16)]


def test_a_pyramid_has_one_size_a_level_and_one_map_has_all() -> None:
    apart = anchors_of(R50_FPN(), Recipe())
    assert [len(cell) for cell in apart] == [3] * 5
    (together,) = anchors_of(R50_C4(), Recipe())
    assert torch.equal(together, torch.cat(apart))


def test_no_index_no_anchor() -> None:
    index = torch.zeros(2, 0, dtype=torch.int64)
    cell = cell_anchors(32, RATIOS, rounded=True)
    assert anchors_at(index, cell, grid=ImageSize(1, 1), stride=ImageSize(4, 4)).shape == (2, 0, 4)

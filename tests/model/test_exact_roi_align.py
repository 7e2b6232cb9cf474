from __future__ import annotations

import torch
from torchvision.ops import MultiScaleRoIAlign

from model.exact_roi_align import exact_roi_align
from model.roi_align import multilevel_roi_align

STRIDES = (4, 8, 16, 32)


def _case(count: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Levels of two 256 × 320 images, boxes from a few pixels to the whole image, and whose they are."""
    torch.manual_seed(0)
    levels = [torch.randn(2, 3, 256 // stride, 320 // stride) for stride in STRIDES]
    corner = torch.rand(count, 2) * 100
    side = torch.exp(torch.rand(count, 1) * 5) + torch.rand(count, 2)
    return levels, torch.cat([corner, corner + side], dim=1), torch.arange(count) % 2


def test_is_torchvisions_to_the_last_bit() -> None:
    levels, boxes, image_index = _case(60)
    theirs = MultiScaleRoIAlign([str(level) for level in range(4)], output_size=7, sampling_ratio=2)
    by_image = [boxes[image_index == image] for image in range(2)]
    expected = theirs({str(level): value for level, value in enumerate(levels)}, by_image, [(256, 320)] * 2)
    order = image_index.argsort(stable=True)
    found = exact_roi_align(
        levels, STRIDES, boxes[order], image_index[order], output_size=7, sampling_ratio=2, aligned=False
    )
    assert torch.equal(found, expected)


def test_agrees_with_the_fast_one() -> None:
    levels, boxes, image_index = _case(60)
    for aligned in (False, True):
        found, fast = (
            align(levels, STRIDES, boxes, image_index, output_size=5, sampling_ratio=2, aligned=aligned)
            for align in (exact_roi_align, multilevel_roi_align)
        )
        torch.testing.assert_close(found, fast, rtol=1e-4, atol=1e-4)


def test_no_boxes() -> None:
    levels, boxes, image_index = _case(0)
    found = exact_roi_align(levels, STRIDES, boxes, image_index, output_size=7, sampling_ratio=2, aligned=False)
    assert found.shape == (0, 3, 7, 7)

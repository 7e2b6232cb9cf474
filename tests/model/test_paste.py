"""Both paste rules against a loop, against torchvision and grid_sample, and by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from model.paste import PasteRule, paste_probabilities
from model.structures import ImageSize
from tests.reference import paste as reference

Floats = NDArray[np.float32]

CERTAIN = 200.0
"""A logit whose probability is one in float32."""


def random_logits(seed: int, num_masks: int, side: int) -> Tensor:
    """Smooth blobs, as a mask head gives them."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_masks, 1, 5, 5, generator=random) * 4
    return F.interpolate(coarse, size=(side, side), mode="bicubic")[:, 0]


def random_boxes(seed: int, num_boxes: int, size: ImageSize) -> Tensor:
    """Boxes of all sizes about the image, many across its edges, some outside, some without extent."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.tensor([size.width, size.height])
    corner = (torch.rand(num_boxes, 2, generator=random) * 1.6 - 0.5) * scale
    extent = torch.rand(num_boxes, 2, generator=random) ** 2 * 1.3 * scale
    extent[::6, 0] = 0
    return torch.cat([corner, corner + extent], dim=1)


def whole_images(logits: Tensor, boxes: Tensor, size: ImageSize, paste: PasteRule) -> Floats:
    """The pieces in images of their own: (D, H, W)."""
    images = np.zeros((len(boxes), *size), np.float32)
    pieces = paste_probabilities(logits, boxes, size, paste=paste)
    for image, (piece, (top, left)) in zip(images, pieces, strict=True):
        height, width = piece.shape
        assert top + height <= size.height
        assert left + width <= size.width
        image[top : top + height, left : left + width] = piece
    return images


def test_detectron2_by_hand() -> None:
    # Two cells on four pixels: pixel centres lie at -1/4, 1/4, 3/4, 5/4 cells from the centre of the first, the two
    # pixels beyond each edge at -3/4 and -5/4, and the mask falls to zero over one cell.
    profile = np.array([0, 0, 0.25, 0.75, 1, 1, 0.75, 0.25, 0], np.float32)
    image = whole_images(torch.full((1, 2, 2), CERTAIN), torch.tensor([[3.0, 3, 7, 7]]), ImageSize(9, 9), "detectron2")
    np.testing.assert_allclose(image[0], np.outer(profile, profile), atol=1e-6)


def test_torchvision_by_hand() -> None:
    # A 2 × 2 mask is padded to 4, so the box (3, 3, 5, 5) grows by 4/2 to 2 … 6: pixels 2 to 6, five for four cells.
    knot = (np.arange(5) + 0.5) * 4 / 5 - 0.5
    profile = np.zeros(9)
    profile[2:7] = np.interp(knot, [0, 1, 2, 3], [0, 1, 1, 0])
    image = whole_images(torch.full((1, 2, 2), CERTAIN), torch.tensor([[3.0, 3, 5, 5]]), ImageSize(9, 9), "torchvision")
    np.testing.assert_allclose(image[0], np.outer(profile, profile), atol=1e-6)


@pytest.mark.parametrize("paste", ["torchvision", "detectron2"])
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    side=st.sampled_from([1, 2, 7, 14]),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
)
def test_agrees_with_the_loop(paste: PasteRule, seed: int, side: int, height: int, width: int) -> None:
    size = ImageSize(height, width)
    logits, boxes = random_logits(seed, 3, side), random_boxes(seed, 3, size)
    by_loop = reference.paste_torchvision if paste == "torchvision" else reference.paste_detectron2
    for image, mask, box in zip(
        whole_images(logits, boxes, size, paste), logits.sigmoid().numpy(), boxes.numpy(), strict=True
    ):
        # Steep masks in boxes thinner than a pixel turn the rounding of a position into one of a probability.
        np.testing.assert_allclose(image, by_loop(mask, box, size), atol=1e-3)


@pytest.mark.parametrize("size", [ImageSize(97, 133), ImageSize(240, 320), ImageSize(1, 1), ImageSize(9, 7)])
def test_agrees_with_torchvision(size: ImageSize) -> None:
    logits, boxes = random_logits(0, 40, 28), random_boxes(0, 40, size)
    boxes[:, 0::2].clamp_(0, size.width)  # torchvision cannot paste a box that lies outside
    boxes[:, 1::2].clamp_(0, size.height)
    expected = paste_masks_in_image(logits.sigmoid()[:, None], boxes, tuple(size))[:, 0]
    np.testing.assert_allclose(whole_images(logits, boxes, size, "torchvision"), expected.numpy(), atol=2e-6)


def test_agrees_with_grid_sample() -> None:
    # detectron2's layers/mask_ops.py _do_paste_mask, without its chunks.
    size = ImageSize(97, 133)
    logits, boxes = random_logits(1, 40, 28), random_boxes(1, 40, size)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 0.5)
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)
    y = (torch.arange(size.height) + 0.5 - y1) / (y2 - y1) * 2 - 1  # (D, H)
    x = (torch.arange(size.width) + 0.5 - x1) / (x2 - x1) * 2 - 1  # (D, W)
    grid = torch.stack(
        [x[:, None].expand(-1, size.height, -1), y[:, :, None].expand(-1, -1, size.width)], dim=3
    )  # (D, H, W, 2)
    expected = F.grid_sample(logits.sigmoid()[:, None], grid, align_corners=False)[:, 0]
    np.testing.assert_allclose(whole_images(logits, boxes, size, "detectron2"), expected.numpy(), atol=2e-4)


@pytest.mark.parametrize("paste", ["torchvision", "detectron2"])
def test_a_shift_of_the_box_by_whole_pixels_shifts_the_piece(paste: PasteRule) -> None:
    logits, boxes = random_logits(2, 2, 28), torch.tensor([[10.25, 12.5, 30.75, 50], [8, 8, 40, 20]])
    size = ImageSize(100, 120)
    before = paste_probabilities(logits, boxes, size, paste=paste)
    after = paste_probabilities(logits, boxes + torch.tensor([7, 3, 7, 3]), size, paste=paste)
    for (piece, (top, left)), (moved, (moved_top, moved_left)) in zip(before, after, strict=True):
        assert (moved_top, moved_left) == (top + 3, left + 7)
        np.testing.assert_allclose(moved, piece, atol=1e-5)


@pytest.mark.parametrize("paste", ["torchvision", "detectron2"])
@pytest.mark.parametrize(
    "box",
    [
        [-50.0, 2, -20, 8],
        [200.0, 2, 230, 8],
        [2.0, -50, 8, -20],
        [2.0, 200, 8, 230],
        [-1e9, -1e9, -1e8, -1e8],
        [math.nan, 2, 8, 8],
        [2.0, 2, math.inf, 8],
        [8.0, 8, 2, 2],
    ],
)
def test_a_box_outside_gives_an_empty_piece(paste: PasteRule, box: list[float]) -> None:
    logits = torch.full((1, 28, 28), CERTAIN)
    ((piece, (top, left)),) = paste_probabilities(logits, torch.tensor([box]), ImageSize(20, 30), paste=paste)
    assert piece.size == 0
    assert 0 <= top <= 20
    assert 0 <= left <= 30


@pytest.mark.parametrize("paste", ["torchvision", "detectron2"])
def test_a_piece_is_no_larger_than_the_image(paste: PasteRule) -> None:
    logits, boxes = torch.full((1, 28, 28), CERTAIN), torch.tensor([[-1e5, -1e5, 1e5, 1e5]])
    ((piece, corner),) = paste_probabilities(logits, boxes, ImageSize(5, 6), paste=paste)
    assert corner == (0, 0)
    np.testing.assert_allclose(piece, np.ones((5, 6)), atol=1e-5)


def test_no_detections_give_no_pieces() -> None:
    assert paste_probabilities(torch.zeros(0, 28, 28), torch.zeros(0, 4), ImageSize(5, 6)) == []

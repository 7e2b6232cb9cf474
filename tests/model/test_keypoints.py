"""Keypoints from heatmaps against a loop, against torchvision, and by hand."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from model import keypoints
from model.keypoint_targets import heatmap_targets
from model.keypoints import decode_heatmaps
from tests.reference import keypoints as reference

TIED = 1e-4
"""Pixels whose logits differ by less are equal: rounding decides which is the largest."""


def random_case(
    seed: int, num_regions: int, *, side: int, largest: float, num_keypoints: int = 5
) -> tuple[Tensor, ...]:
    """Noise and boxes of all sizes, as many small as large ones; every fifth has no width."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_regions, 2, generator=random) * 100 - 20
    extent = 0.3 * (largest / 0.3) ** torch.rand(num_regions, 2, generator=random)
    extent[::5, 0] = 0
    heatmaps = torch.randn(num_regions, num_keypoints, side, side, generator=random)
    return heatmaps, torch.cat([corner, corner + extent], dim=1)


def bumps(seed: int, num_regions: int, num_keypoints: int, side: int) -> Tensor:
    """Heatmaps as a trained head gives them: a bump of logits somewhere on a slope."""
    random = torch.Generator().manual_seed(seed)
    centre = torch.rand(num_regions, num_keypoints, 2, 1, generator=random) * side
    distance = (torch.arange(side) + 0.5 - centre) / (1.5 + 2 * torch.rand(centre.shape, generator=random))
    x, y = distance.square().unbind(2)  # (R, K, S) each
    slope = torch.rand(num_regions, num_keypoints, 1, 1, generator=random) * torch.linspace(-2, 2, side)
    return 14 * torch.exp(-(y[..., None] + x[:, :, None]) / 2) - 8 + slope


def check_as_torchvision(heatmaps: Tensor, boxes: Tensor) -> None:
    found = decode_heatmaps(heatmaps, boxes, score="logit")
    places, scores = heatmaps_to_keypoints(heatmaps, boxes)
    torch.testing.assert_close(found[..., 2], scores, atol=1e-4, rtol=0)
    for region, keypoint in ((found[..., :2] - places[..., :2]).abs().amax(dim=2) > 0.1).nonzero().tolist():
        # Another pixel, which is right only if theirs is no larger.
        width, height = (boxes[region, 2:] - boxes[region, :2]).clamp(min=1).tolist()
        size = (math.ceil(height), math.ceil(width))
        plane = F.interpolate(heatmaps[region, keypoint][None, None], size=size, mode="bicubic")[0, 0]
        x, y = (found[region, keypoint, :2] - boxes[region, :2]).tolist()
        column, row = int(x * size[1] / width), int(y * size[0] / height)
        assert plane[row, column] >= plane.max() - TIED


def test_places_and_scores_by_hand() -> None:
    # As many pixels as cells, so nothing is interpolated; the box is 3.5 px wide, its four pixels 0.875 each.
    heatmaps = torch.zeros(1, 3, 4, 4)
    heatmaps[0, 0, 1, 2] = math.log(5)
    heatmaps[0, 1, 2, 1] = heatmaps[0, 1, 2, 3] = heatmaps[0, 1, 3, 0] = 1.0  # the first of the largest
    box = torch.tensor([[10.0, 20, 13.5, 24]])  # the third is level: its first pixel
    places = [(10 + 2.5 * 0.875, 21.5), (10 + 1.5 * 0.875, 22.5), (10 + 0.5 * 0.875, 20.5)]
    # Share of the heatmap: 5 / (5 + 15), e / (3 e + 13), 1 / 16.
    scores = {"logit": (math.log(5), 1.0, 0.0), "softmax": (1 / 4, math.e / (3 * math.e + 13), 1 / 16)}
    kinds: tuple[Literal["logit", "softmax"], ...] = ("logit", "softmax")
    for kind in kinds:
        found = decode_heatmaps(heatmaps, box, score=kind)[0]
        expected = [(x, y, score) for (x, y), score in zip(places, scores[kind], strict=True)]
        assert [tuple(row) for row in found.tolist()] == [pytest.approx(row, rel=1e-6) for row in expected]


def test_one_pixel_takes_the_four_middle_cells() -> None:
    # Half way between two cells the kernel gives (-3, 19, 19, -3) / 32.
    weights = torch.tensor([-3.0, 19, 19, -3]) / 32
    heatmap = torch.arange(16.0).view(4, 4).square()
    found = decode_heatmaps(heatmap[None, None], torch.tensor([[5.0, 6, 5.25, 6]]), score="logit")
    assert found[0, 0].tolist() == pytest.approx([5.5, 6.5, float(weights @ heatmap @ weights)])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), side=st.sampled_from([1, 4, 7]), softmax=st.booleans())
def test_agrees_with_the_loop(seed: int, side: int, softmax: bool) -> None:
    heatmaps, boxes = random_case(seed, 4, side=side, largest=20, num_keypoints=2)
    found = decode_heatmaps(heatmaps, boxes, score="softmax" if softmax else "logit").double().numpy()
    for region, box in enumerate(boxes.double().numpy()):
        for index, plane in enumerate(heatmaps[region].double().numpy()):
            x, y, score = reference.keypoint(plane, box, softmax=softmax)
            assert found[region, index, 2] == pytest.approx(score, rel=1e-4, abs=1e-4)
            largest_two = np.sort(reference.over_box(plane, box)[0].flatten())[-2:]
            if len(largest_two) == 1 or largest_two[1] - largest_two[0] > TIED:
                assert found[region, index, :2] == pytest.approx((x, y), abs=1e-4)


@pytest.mark.parametrize(("seed", "side"), [(0, 56), (1, 56), (2, 14)])
def test_agrees_with_torchvision_on_noise(seed: int, side: int) -> None:
    check_as_torchvision(*random_case(seed, 40, side=side, largest=300))


def test_agrees_with_torchvision_on_bumps() -> None:
    _, boxes = random_case(3, 30, side=1, largest=500)
    check_as_torchvision(bumps(3, 30, 17, 56), boxes)


def test_agrees_with_torchvision_on_the_largest_and_the_smallest_box() -> None:
    boxes = torch.tensor([[0.0, 0, 1300, 1300], [7, 7, 7.3, 7.3], [3, 0, 1303, 0.3], [9, 0, 9.3, 1299.5], [1, 1, 2, 2]])
    check_as_torchvision(bumps(4, 5, 3, 56), boxes)


def test_softmax_is_detectron2s() -> None:
    """Its formula: at the largest pixel e⁰, over the heatmap's cells e to their distance below it."""
    heatmaps, boxes = random_case(5, 12, side=56, largest=200)
    logits = decode_heatmaps(heatmaps, boxes, score="logit")[..., 2]
    expected = 1 / (heatmaps - logits[..., None, None]).exp().sum(dim=(2, 3))
    torch.testing.assert_close(decode_heatmaps(heatmaps, boxes, score="softmax")[..., 2], expected)


def test_a_heatmap_far_below_zero_has_a_softmax_score() -> None:
    heatmaps = bumps(6, 1, 2, 14) - torch.tensor([500.0, -500.0])[:, None, None]
    scores = decode_heatmaps(heatmaps, torch.tensor([[0.0, 0, 14, 14]]), score="softmax")[..., 2]
    expected = heatmaps.flatten(2).softmax(dim=2).amax(dim=2)  # no interpolation: a probability
    torch.testing.assert_close(scores, expected, atol=0, rtol=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_decoding_inverts_encoding_to_a_cell(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(8, 2, generator=random) * 50
    sides = 14 + torch.rand(8, 2, generator=random) * 100
    boxes = torch.cat([corner, corner + sides], dim=1)
    points = corner[:, None] + torch.rand(8, 3, 2, generator=random) * sides[:, None]
    cell, there = heatmap_targets(torch.cat([points, torch.ones(8, 3, 1)], dim=2), boxes, side=14)
    assert there.all()
    heatmaps = F.one_hot(cell, 14 * 14).view(8, 3, 14, 14)
    found = decode_heatmaps(heatmaps, boxes, score="logit")[..., :2]
    # In the same cell (at the heatmap's border the largest pixel is the outermost), and half a pixel to a middle.
    assert ((found - points).abs() <= (sides / 14)[:, None] + 0.5 + 1e-3).all()


def test_shifting_the_box_shifts_the_keypoints() -> None:
    heatmaps, boxes = random_case(7, 20, side=14, largest=100)
    boxes = (boxes * 8).round() / 8  # so that adding is exact
    shift = torch.tensor([64.0, -16, 64, -16])
    shifted = decode_heatmaps(heatmaps, boxes + shift, score="logit") - torch.tensor([64.0, -16, 0])
    torch.testing.assert_close(shifted, decode_heatmaps(heatmaps, boxes, score="logit"), atol=1e-3, rtol=0)


@pytest.mark.parametrize("chunk_values", [1, 20_000])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, chunk_values: int) -> None:
    heatmaps, boxes = random_case(8, 30, side=14, largest=60)
    boxes = torch.cat([boxes, boxes[:8]])
    heatmaps = torch.cat([heatmaps, heatmaps[:8]])
    expected = decode_heatmaps(heatmaps, boxes, score="logit")
    torch.testing.assert_close(expected[:8], expected[30:], atol=1e-4, rtol=0)
    shuffle = torch.randperm(38, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(keypoints, "CHUNK_VALUES", chunk_values)
    found = decode_heatmaps(heatmaps[shuffle], boxes[shuffle], score="logit")
    torch.testing.assert_close(found, expected[shuffle], atol=1e-4, rtol=0)


def test_a_chunk_holds_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_case(10, 200, side=1, largest=300)[1][:, 2:].clamp(min=1).ceil()
    monkeypatch.setattr(keypoints, "CHUNK_VALUES", 50_000)
    chunks = list(keypoints._chunks(pixels, num_keypoints=5))
    assert sorted(torch.cat([chunk for chunk, _, _ in chunks]).tolist()) == list(range(200))
    for chunk, width, height in chunks:
        assert len(chunk) == 1 or len(chunk) * width * height * 5 <= 50_000
        assert (pixels[chunk] <= torch.tensor([width, height])).all()
        # Padding is bounded: no side is less than 2^-½ of the chunk's, but among the small ones.
        assert (pixels[chunk].clamp(min=16) * 2**0.5 >= torch.tensor([width, height]).clamp(min=16) - 1e-3).all()


def test_half_precision_and_autocast_decode_in_float32() -> None:
    heatmaps, boxes = random_case(11, 10, side=14, largest=300)
    heatmaps = heatmaps.bfloat16()
    expected = decode_heatmaps(heatmaps.float(), boxes, score="softmax")
    with torch.autocast("cpu", torch.bfloat16):
        found = decode_heatmaps(heatmaps, boxes, score="softmax")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("edge", [math.nan, math.inf])
def test_a_box_that_is_not_finite_is_refused(edge: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        decode_heatmaps(torch.zeros(1, 2, 4, 4), torch.tensor([[0, 0, edge, 5]]), score="logit")


def test_no_regions() -> None:
    assert decode_heatmaps(torch.zeros(0, 17, 56, 56), torch.zeros(0, 4), score="softmax").shape == (0, 17, 3)


@pytest.mark.gpu
def test_cuda_agrees_with_torchvision() -> None:
    heatmaps, boxes = bumps(12, 100, 17, 56).cuda(), random_case(12, 100, side=1, largest=900)[1].cuda()
    check_as_torchvision(heatmaps, boxes)

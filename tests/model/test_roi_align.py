"""Multi-level RoIAlign against a loop, against torchvision, and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

from model.roi_align import assign_levels, multilevel_roi_align
from tests.reference import roi_align as reference

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 192, 256


def random_pyramid(seed: int, *, num_images: int = 2, num_channels: int = 8) -> list[Tensor]:
    """Maps of a 192 × 256 input, channels-last."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_images, num_channels, HEIGHT // stride, WIDTH // stride, generator=random).contiguous(
            memory_format=torch.channels_last
        )
        for stride in STRIDES
    ]


def random_boxes(seed: int, num_boxes: int) -> tuple[Tensor, Tensor]:
    """Boxes of all sizes, some outside, some without extent, and their images."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_boxes, 2, generator=random) * 340 - 60
    extent = torch.rand(num_boxes, 2, generator=random) ** 3 * 500
    extent[::7] = 0
    return torch.cat([corner, corner + extent], dim=1), torch.randint(2, (num_boxes,), generator=random)


def by_loop(
    features: list[Tensor], box: Tensor, image: int, *, output_size: int, sampling_ratio: int, aligned: bool
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    level = reference.level(box.double().numpy(), len(features))
    return np.stack(
        [
            reference.roi_align(
                plane.double().numpy(),
                box.double().numpy(),
                STRIDES[level],
                output_size=output_size,
                sampling_ratio=sampling_ratio,
                aligned=aligned,
            )
            for plane in features[level][image]
        ]
    )


@pytest.mark.parametrize(
    ("side", "level"),
    [(224, 4), (223.9, 3), (112, 3), (111.9, 2), (448, 5), (447.9, 4), (10, 2), (0, 2), (5000, 5)],
)
def test_a_box_of_224_px_maps_to_level_4(side: float, level: int) -> None:
    assert assign_levels(torch.tensor([[0.0, 0, side, side]]), 4).tolist() == [level - 2]


def test_a_box_turned_inside_out_maps_to_the_first_level() -> None:
    assert assign_levels(torch.tensor([[300.0, 0, 0, 300]]), 4).tolist() == [0]


def test_a_single_level_takes_every_box() -> None:
    ramp = torch.arange(16.0).repeat(12, 1)[None, None]
    boxes = torch.tensor([[16.0, 16, 32, 32], [0, 0, 200, 160]])
    pooled = multilevel_roi_align(
        [ramp], [16], boxes, torch.zeros(2, dtype=torch.int64), output_size=1, sampling_ratio=2, aligned=True
    )
    # The middle of each box in pixels of the map, half a pixel to the left.
    assert pooled.flatten().tolist() == pytest.approx([24 / 16 - 0.5, 100 / 16 - 0.5])


@pytest.mark.parametrize(("aligned", "offset"), [(True, 0.5), (False, 0.0)])
def test_bins_of_a_ramp_hold_their_centres(aligned: bool, offset: float) -> None:
    # A linear map is reproduced by linear interpolation, so a bin holds the value at its centre.
    columns = torch.arange(WIDTH // 4, dtype=torch.float32).repeat(HEIGHT // 4, 1)
    rows = torch.arange(HEIGHT // 4, dtype=torch.float32)[:, None].repeat(1, WIDTH // 4)
    features = [torch.stack([columns, rows])[None]]
    box = torch.tensor([[40.0, 20, 96, 62]])  # level 2: bins of 8 × 6 px, 2 × 1.5 cells
    pooled = multilevel_roi_align(
        features, [4], box, torch.zeros(1, dtype=torch.int64), output_size=7, sampling_ratio=2, aligned=aligned
    )
    for index in range(7):
        assert pooled[0, 0, :, index].tolist() == pytest.approx([10 + 2 * (index + 0.5) - offset] * 7)
        assert pooled[0, 1, index, :].tolist() == pytest.approx([5 + 1.5 * (index + 0.5) - offset] * 7)


@pytest.mark.parametrize(("centre", "value"), [(-1.25, 0), (-1, 1), (-0.5, 1), (3.5, 1), (4, 1), (4.25, 0)])
def test_samples_count_up_to_a_pixel_outside(centre: float, value: float) -> None:
    # One sample in the middle of a box of two pixels, on a map of four.
    box = torch.tensor([[centre - 1, 1, centre + 1, 3]]) * 4
    for turned in (box, box[:, [1, 0, 3, 2]]):
        pooled = multilevel_roi_align(
            [torch.ones(1, 1, 4, 4)],
            [4],
            turned,
            torch.zeros(1, dtype=torch.int64),
            output_size=1,
            sampling_ratio=1,
            aligned=False,
        )
        assert pooled.item() == value


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    output_size=st.sampled_from([1, 2, 5]),
    sampling_ratio=st.integers(1, 3),
    aligned=st.booleans(),
)
def test_agrees_with_the_loop(seed: int, output_size: int, sampling_ratio: int, aligned: bool) -> None:
    features = random_pyramid(seed, num_channels=2)
    boxes, image_index = random_boxes(seed, 6)
    pooled = multilevel_roi_align(
        features,
        STRIDES,
        boxes,
        image_index,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    for box, image, maps in zip(boxes, image_index.tolist(), pooled, strict=True):
        expected = by_loop(
            features, box, image, output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned
        )
        np.testing.assert_allclose(maps.numpy(), expected, atol=1e-4)


def by_torchvision(features: list[Tensor], boxes: Tensor, image_index: Tensor, size: int, ratio: int) -> Tensor:
    """MultiScaleRoIAlign, its output put back in the order of ``boxes``."""
    order = torch.argsort(image_index, stable=True)
    maps = {str(level): feature.contiguous() for level, feature in enumerate(features)}
    per_image = [boxes[image_index == image] for image in range(len(features[0]))]
    pool = MultiScaleRoIAlign(list(maps), size, ratio)
    pooled: Tensor = pool(maps, per_image, [(HEIGHT, WIDTH)] * len(per_image))
    return torch.empty_like(pooled).index_copy_(0, order, pooled)


@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(7, 2), (14, 2), (7, 1), (14, 0), (7, 0)])
def test_agrees_with_torchvision(output_size: int, sampling_ratio: int) -> None:
    features = random_pyramid(0)
    boxes, image_index = random_boxes(0, 800)
    pooled = multilevel_roi_align(
        features,
        STRIDES,
        boxes,
        image_index,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=False,
    )
    expected = by_torchvision(features, boxes, image_index, output_size, sampling_ratio)
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=0)


@settings(deadline=None, max_examples=100)
@given(
    corners=arrays(np.float32, (5, 4), elements=st.floats(-40, 240, width=16)),
    output_size=st.sampled_from([1, 2, 7, 14]),
    aligned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_adaptive_sampling_agrees_with_torchvision_for_any_box(
    corners: NDArray[np.float32], output_size: int, aligned: bool, dtype: torch.dtype
) -> None:
    """Boxes outside the map, without area, on pixel borders, many pixels a bin."""
    feature = torch.randn(2, 8, 37, 51, generator=torch.Generator().manual_seed(1))
    feature = feature.to(dtype).contiguous(memory_format=torch.channels_last)
    corners = np.sort(corners.reshape(5, 2, 2), axis=1).reshape(5, 4)  # torchvision ends on one turned inside out
    boxes = torch.from_numpy(corners)
    image_index = torch.tensor([0, 1, 0, 1, 1])
    found = multilevel_roi_align(
        [feature], [4], boxes, image_index, output_size=output_size, sampling_ratio=0, aligned=aligned
    )
    rois = torch.cat([image_index[:, None].float(), boxes], dim=1)
    expected = torchvision_roi_align(feature.float(), rois, output_size, 0.25, 0, aligned)
    tolerance = 2e-5 if dtype == torch.float32 else 0.04
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=0)


def pool_by_7(features: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
    return multilevel_roi_align(features, STRIDES, boxes, image_index, output_size=7, sampling_ratio=2, aligned=True)


@pytest.mark.parametrize("num_channels", [1, 3, 8])
def test_memory_order_does_not_matter(num_channels: int) -> None:
    features = random_pyramid(1, num_channels=num_channels)
    boxes, image_index = random_boxes(1, 50)
    channels_first = [feature.contiguous() for feature in features]
    torch.testing.assert_close(pool_by_7(channels_first, boxes, image_index), pool_by_7(features, boxes, image_index))


def test_bfloat16_is_near_float32() -> None:
    features = [feature.bfloat16() for feature in random_pyramid(2)]
    boxes, image_index = random_boxes(2, 200)
    pooled = pool_by_7(features, boxes, image_index)
    assert pooled.dtype == torch.bfloat16
    expected = pool_by_7([feature.float() for feature in features], boxes, image_index)
    # Eight bits for a value of at most 6, and again for each of the weights it is a sum over.
    torch.testing.assert_close(pooled.float(), expected, atol=6 * 2**-8, rtol=2**-7)


def test_gradients_are_torchvisions() -> None:
    features = [feature.requires_grad_() for feature in random_pyramid(3)]
    boxes, image_index = random_boxes(3, 60)
    pooled = multilevel_roi_align(features, STRIDES, boxes, image_index, output_size=7, sampling_ratio=2, aligned=False)
    weight = torch.randn_like(pooled)
    gradients = torch.autograd.grad((pooled * weight).sum(), features)
    expected = torch.autograd.grad((by_torchvision(features, boxes, image_index, 7, 2) * weight).sum(), features)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_gradients_are_those_of_the_function(aligned: bool, sampling_ratio: int) -> None:
    random = torch.Generator().manual_seed(11)
    shapes = [(2, 2, 8 // scale, 12 // scale) for scale in (1, 2)]
    features = [torch.randn(shape, dtype=torch.float64, generator=random).requires_grad_() for shape in shapes]
    # Inside, without extent, far over every edge (the second level), and half outside.
    boxes = torch.tensor([[3.0, 2, 40, 30], [9, 9, 9, 9], [-60, -60, 200, 200], [30, -10, 60, 12]])

    def pool(*levels: Tensor) -> Tensor:
        return multilevel_roi_align(
            levels,
            (4, 8),
            boxes,
            torch.tensor([0, 1, 1, 0]),
            output_size=3,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )

    assert pool(*features).dtype == torch.float64
    assert torch.autograd.gradcheck(pool, features)


@pytest.mark.parametrize("aligned", [True, False])
def test_training_sees_the_values_of_inference(aligned: bool) -> None:
    boxes, image_index = random_boxes(12, 40)
    without, trained = (
        multilevel_roi_align(
            [feature.requires_grad_(trains) for feature in random_pyramid(12)],
            STRIDES,
            boxes,
            image_index,
            output_size=7,
            sampling_ratio=2,
            aligned=aligned,
        )
        for trains in (False, True)
    )
    assert (without.requires_grad, trained.requires_grad) == (False, True)
    assert torch.equal(without, trained.detach())


def test_a_level_without_boxes_takes_part_in_gradients() -> None:
    features = [feature.requires_grad_() for feature in random_pyramid(13)]
    for boxes in (torch.tensor([[0.0, 0.0, 20.0, 20.0]]), torch.zeros(0, 4)):
        pooled = pool_by_7(features, boxes, torch.zeros(len(boxes), dtype=torch.int64))
        gradients = torch.autograd.grad(pooled.sum(), features)  # raises for one that takes no part
        assert [bool(gradient.any()) for gradient in gradients] == [len(boxes) > 0, False, False, False]


def test_bf16_gradients_are_near() -> None:
    boxes, image_index = random_boxes(14, 50)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        features = [feature.to(dtype).requires_grad_() for feature in random_pyramid(14)]
        pooled = pool_by_7(features, boxes, image_index)
        gradients.append(torch.autograd.grad(pooled.float().square().sum(), features))
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).norm() <= 0.02 * exact.norm()


def test_output_is_channels_last() -> None:
    pooled = pool_by_7(random_pyramid(4), *random_boxes(4, 9))
    assert pooled.shape == (9, 8, 7, 7)
    assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_boxes_do_not_affect_each_other() -> None:
    features = random_pyramid(5)
    boxes, image_index = random_boxes(5, 300)
    pooled = pool_by_7(features, boxes, image_index)
    shuffle = torch.randperm(300, generator=torch.Generator().manual_seed(6))
    assert torch.equal(pool_by_7(features, boxes[shuffle], image_index[shuffle]), pooled[shuffle])
    assert torch.equal(pool_by_7(features, boxes[17:18], image_index[17:18]), pooled[17:18])


def test_shifting_box_and_map_together_changes_nothing() -> None:
    features = random_pyramid(6)
    boxes = torch.tensor([[60.0, 50, 100, 99], [64.5, 40.25, 160, 130]])  # levels 2 and 2, inside
    image_index = torch.tensor([0, 1])
    shifted = [torch.roll(feature, (2, 3), dims=(2, 3)) for feature in features]
    shift = torch.tensor([3, 2, 3, 2]) * STRIDES[0]
    assert assign_levels(boxes, 4).tolist() == [0, 0]
    torch.testing.assert_close(
        pool_by_7(shifted, boxes + shift, image_index), pool_by_7(features, boxes, image_index), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("edge", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite_pools_zeros(edge: float, sampling_ratio: int) -> None:
    features = random_pyramid(7)
    boxes, image_index = random_boxes(7, 3)
    spoilt = boxes.clone()
    spoilt[1, 2] = edge
    pooled, expected = (
        multilevel_roi_align(
            features, STRIDES, each, image_index, output_size=7, sampling_ratio=sampling_ratio, aligned=True
        )
        for each in (spoilt, boxes)
    )
    assert torch.equal(pooled[1], torch.zeros_like(pooled[1]))
    assert torch.equal(pooled[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_no_boxes_pool_to_nothing(sampling_ratio: int) -> None:
    pooled = multilevel_roi_align(
        random_pyramid(8),
        STRIDES,
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        output_size=7,
        sampling_ratio=sampling_ratio,
        aligned=True,
    )
    assert pooled.shape == (0, 8, 7, 7)


def test_as_many_strides_as_maps() -> None:
    with pytest.raises(ValueError, match="4 and 1"):
        multilevel_roi_align(random_pyramid(9), [4], *random_boxes(9, 1), output_size=7, sampling_ratio=2, aligned=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype: torch.dtype) -> None:
    features = [feature.to(dtype) for feature in random_pyramid(10)]
    boxes, image_index = random_boxes(10, 300)
    on_cuda = pool_by_7([feature.cuda() for feature in features], boxes.cuda(), image_index.cuda())
    expected = pool_by_7(features, boxes, image_index)
    atol = 1e-4 if dtype == torch.float32 else 6 * 2**-8
    torch.testing.assert_close(on_cuda.cpu().float(), expected.float(), atol=atol, rtol=2**-7)

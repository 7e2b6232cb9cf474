"""The RoIAlign kernels against a loop, against the CPU's operator, and by hand; compiled for a GPU without one."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import model.kernels.roi_align as kernels
from model.kernels.roi_align import roi_align, share_gradients
from model.roi_align import assign_levels, multilevel_roi_align
from tests.reference import roi_align as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 64, 96

SPECIAL_BOXES = {
    "inside": [9, 6, 30, 25],
    "a point": [20, 20, 20, 20],
    "one pixel": [20, 20, 24, 24],
    "the whole image": [0, 0, WIDTH, HEIGHT],
    "over every edge": [-30, -20, 140, 90],
    "half a pixel over": [-2, -2, 2, 2],
    "across a corner": [80, 50, 120, 80],
    "outside": [-90, -90, -40, -40],
    "beside": [200, 10, 240, 30],
    "turned inside out": [60, 40, 10, 5],
    "turned in x": [60, 5, 10, 40],
}


class Options(TypedDict):
    output_size: int
    sampling_ratio: int
    aligned: bool


def pyramid(seed: int, *, num_levels: int = 4, num_channels: int = 3) -> list[Tensor]:
    """Maps of two images of 64 × 96, channels-last."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, num_channels, HEIGHT // stride, WIDTH // stride, generator=random)
        .contiguous(memory_format=torch.channels_last)
        .to(DEVICE)
        for stride in STRIDES[:num_levels]
    ]


def random_regions(seed: int, num_boxes: int, *, num_levels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of all sizes, some outside, some without extent, one turned inside out; their images and levels."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_boxes, 2, generator=random) * 130 - 30
    extent = torch.rand(num_boxes, 2, generator=random) ** 2 * 120
    extent[::4] = 0
    boxes = torch.cat([corner, corner + extent], dim=1)
    boxes[1::5] = boxes[1::5, [2, 3, 0, 1]]
    image_index, level_index = (
        torch.randint(count, (num_boxes,), generator=random, device="cpu") for count in (2, num_levels)
    )
    return boxes.to(DEVICE), image_index.to(DEVICE), level_index.to(DEVICE)


def by_loop(features: Sequence[Tensor], regions: Sequence[Tensor], **options: Unpack[Options]) -> Tensor:
    maps = [
        [
            reference.roi_align(
                plane,
                box.double().cpu().numpy(),
                STRIDES[level],
                **options,
            )
            for plane in features[level][image].double().cpu().numpy()
        ]
        for box, image, level in zip(regions[0], regions[1].tolist(), regions[2].tolist(), strict=True)
    ]
    return torch.from_numpy(np.array(maps)).to(DEVICE)


def by_operator(features: Sequence[Tensor], regions: Sequence[Tensor], **options: Unpack[Options]) -> Tensor:
    """Each box from a pyramid of the one level it is given, by the operator of the CPU."""
    pooled = []
    for box, image, level in zip(*(each.cpu() for each in regions), strict=True):
        # Turned inside out it takes no sample and pools zeros; torchvision asks for memory of a negative size.
        turned = options["aligned"] and options["sampling_ratio"] == 0 and bool((box[2:] < box[:2]).any())
        maps = multilevel_roi_align(
            [features[level].cpu()],
            [STRIDES[level]],
            box[None] * (0 if turned else 1),
            image[None],
            **options,
        )
        pooled.append(maps * (0 if turned else 1))
    return torch.cat(pooled).to(DEVICE)


@pytest.mark.parametrize(("aligned", "offset"), [(True, 0.5), (False, 0.0)])
def test_bins_of_a_ramp_hold_their_centres(aligned: bool, offset: float) -> None:
    # A linear map is reproduced by linear interpolation, so a bin holds the value at its centre.
    columns = torch.arange(24.0).repeat(16, 1)
    rows = torch.arange(16.0)[:, None].repeat(1, 24)
    features = [torch.stack([columns, rows])[None].to(DEVICE)]
    box = torch.tensor([[40.0, 20, 72, 44]], device=DEVICE)  # of stride 4: two bins of 4 × 3 cells
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    pooled = roi_align(features, [4], box, zero, zero, output_size=2, sampling_ratio=2, aligned=aligned)
    for index in range(2):
        assert pooled[0, 0, :, index].tolist() == pytest.approx([10 + 4 * (index + 0.5) - offset] * 2)
        assert pooled[0, 1, index, :].tolist() == pytest.approx([5 + 3 * (index + 0.5) - offset] * 2)


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    output_size=st.integers(1, 3),
    sampling_ratio=st.integers(1, 3),
    num_levels=st.integers(1, 4),
    aligned=st.booleans(),
)
def test_agrees_with_the_loop(seed: int, output_size: int, sampling_ratio: int, num_levels: int, aligned: bool) -> None:
    features = pyramid(seed, num_levels=num_levels, num_channels=3)
    regions = random_regions(seed, 5, num_levels=num_levels)
    options: Options = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned}
    pooled = roi_align(features, STRIDES[:num_levels], *regions, **options)
    torch.testing.assert_close(pooled.double(), by_loop(features, regions, **options), atol=2e-5, rtol=0)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_special_boxes_agree_with_the_operator(sampling_ratio: int, aligned: bool) -> None:
    features = pyramid(1, num_channels=2)
    boxes = torch.tensor(list(SPECIAL_BOXES.values()), dtype=torch.float32, device=DEVICE)
    regions = (boxes, torch.arange(len(boxes), device=DEVICE) % 2, assign_levels(boxes, 4))
    options: Options = {"output_size": 2, "sampling_ratio": sampling_ratio, "aligned": aligned}
    pooled = roi_align(features, STRIDES, *regions, **options)
    torch.testing.assert_close(pooled, by_operator(features, regions, **options), atol=2e-6, rtol=0)


def test_agrees_with_the_operator_on_the_levels_it_assigns() -> None:
    features = pyramid(11)  # far smaller than the boxes of the last two levels
    sides = torch.tensor([30.0, 100, 130, 200, 250, 400, 450, 600])
    boxes = torch.stack([-0.3 * sides, -0.4 * sides, 0.7 * sides, 0.6 * sides], dim=1)
    image_index = torch.arange(8) % 2
    options: Options = {"output_size": 2, "sampling_ratio": 2, "aligned": True}
    levels = assign_levels(boxes, 4)
    assert levels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    expected = multilevel_roi_align([each.cpu() for each in features], STRIDES, boxes, image_index, **options)
    on_device = (each.to(DEVICE) for each in (boxes, image_index, levels))
    pooled = roi_align(features, STRIDES, *on_device, **options)
    torch.testing.assert_close(pooled.cpu(), expected, atol=2e-6, rtol=0)


def test_a_bin_of_n_pixels_has_n_samples_when_adaptive() -> None:
    # 7 and 14 pixels in 7 bins: a division that is off by a bit would take one sample more, at other places.
    boxes = torch.tensor([[0.0, 0, 28, 28], [4, 4, 32, 60]], device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    features = pyramid(2, num_levels=1, num_channels=1)
    options: Options = {"output_size": 7, "sampling_ratio": 0, "aligned": True}
    expected = by_operator(features, (boxes, zeros, zeros), **options)
    torch.testing.assert_close(roi_align(features, [4], boxes, zeros, zeros, **options), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("edge", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite_pools_zeros(edge: float, sampling_ratio: int) -> None:
    features = [feature.requires_grad_() for feature in pyramid(3)]
    boxes = torch.tensor([[8.0, 8, 30, 20], [8, 8, edge, 20]], device=DEVICE)
    image_index = torch.tensor([0, 1], device=DEVICE)
    regions = (boxes, image_index, torch.zeros_like(image_index))
    pooled = roi_align(features, STRIDES, *regions, output_size=2, sampling_ratio=sampling_ratio, aligned=False)
    assert not pooled[1].any()
    assert pooled[0].all()
    gradient, *_ = torch.autograd.grad(pooled.sum(), features)
    assert not gradient[1].any()
    assert gradient[0].any()


@pytest.mark.parametrize("num_channels", [1, 3, 8, 300])
def test_any_number_of_channels_in_any_memory_order(num_channels: int) -> None:
    # 300: two programs share the channels of a row, the second has to stop early.
    features = pyramid(4, num_channels=num_channels)
    boxes, image_index, _ = random_regions(4, 4)
    regions = (boxes, image_index, torch.arange(4, device=DEVICE))
    options: Options = {"output_size": 2, "sampling_ratio": 2, "aligned": True}
    channels_first = [feature.contiguous().requires_grad_() for feature in features]
    pooled = roi_align(channels_first, STRIDES, *regions, **options)
    assert torch.equal(pooled, roi_align(features, STRIDES, *regions, **options))
    torch.testing.assert_close(pooled.detach(), by_operator(features, regions, **options), atol=2e-6, rtol=0)
    weight = torch.randn_like(pooled)
    gradients = torch.autograd.grad((pooled * weight).sum(), channels_first)
    expected = torch.autograd.grad((by_operator(channels_first, regions, **options) * weight).sum(), channels_first)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(2, 0), (3, 1), (2, 2), (1, 3)])
def test_gradients_are_the_operators(output_size: int, sampling_ratio: int, aligned: bool) -> None:
    features = [feature.requires_grad_() for feature in pyramid(5, num_channels=2)]
    boxes, _, _ = random_regions(5, 4)
    special = torch.tensor([SPECIAL_BOXES[name] for name in ("over every edge", "turned in x")], device=DEVICE)
    boxes = torch.cat([boxes, special.float()])
    regions = (boxes, torch.arange(6, device=DEVICE) % 2, torch.tensor([2, 3, 0, 1, 2, 3], device=DEVICE))
    options: Options = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned}
    pooled = roi_align(features, STRIDES, *regions, **options)
    weight = torch.randn_like(pooled)
    gradients = torch.autograd.grad((pooled * weight).sum(), features)
    expected = torch.autograd.grad((by_operator(features, regions, **options) * weight).sum(), features)
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in gradients)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_others", [False, True])
def test_gradients_that_are_shared_are_the_same(
    dtype: torch.dtype, with_others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    make = kernels._zeros

    def counted(shapes: Sequence[torch.Size], gradient: Tensor) -> list[Tensor]:
        made.append(shapes)
        return make(shapes, gradient)

    monkeypatch.setattr(kernels, "_zeros", counted)
    features = [feature.to(dtype).requires_grad_() for feature in pyramid(12)]
    precise = [feature.detach().float().requires_grad_() for feature in features]
    heads = [(random_regions(13, 4), 2, torch.randn(4, 3, 2, 2)), (random_regions(14, 3), 3, torch.randn(3, 3, 3, 3))]

    def loss(levels: Sequence[Tensor]) -> Tensor:
        sums = [
            (
                roi_align(levels, STRIDES, *regions, output_size=size, sampling_ratio=2, aligned=True).float()
                * weight.to(DEVICE)
            ).sum()
            for regions, size, weight in heads
        ]
        others = [level.float().square().sum() for level in levels[1:]] if with_others else []
        return torch.stack([*sums, *others]).sum()

    shared = share_gradients(features)
    assert all(torch.equal(one, other) for one, other in zip(shared, features, strict=True))
    for _ in range(2):  # nothing of the first stays
        made.clear()
        found = torch.autograd.grad(loss(shared), features, retain_graph=True)
        assert len(made) == 1
        expected = torch.autograd.grad(loss(precise), precise)
        for gradient, other in zip(found, expected, strict=True):
            assert gradient.dtype == dtype
            assert gradient.is_contiguous(memory_format=torch.channels_last)
            tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(gradient.float(), other, atol=tolerance, rtol=tolerance)
    some = torch.autograd.grad(loss([*shared[:3], features[3]]), features)
    assert len(made) == 5  # those are not all of one node: each for itself, as of `precise`
    for gradient, other in zip(some, expected, strict=True):
        torch.testing.assert_close(gradient.float(), other, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradients_are_those_of_the_function(sampling_ratio: int) -> None:
    features = [feature.double().requires_grad_() for feature in pyramid(6, num_levels=2, num_channels=2)]
    regions = random_regions(6, 3, num_levels=2)

    def pool(*levels: Tensor) -> Tensor:
        return roi_align(levels, STRIDES[:2], *regions, output_size=2, sampling_ratio=sampling_ratio, aligned=True)

    assert pool(*features).dtype == torch.float64
    # The order of atomic additions is not fixed.
    assert torch.autograd.gradcheck(pool, features, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    features = [feature.to(dtype).requires_grad_() for feature in pyramid(7)]
    exact = [feature.detach().float().requires_grad_() for feature in features]
    regions = random_regions(7, 5)
    options: Options = {"output_size": 2, "sampling_ratio": 2, "aligned": True}
    pooled = roi_align(features, STRIDES, *regions, **options)
    expected = roi_align(exact, STRIDES, *regions, **options)
    assert pooled.dtype == dtype
    # Within the last bit: a GPU rounds to the nearest, the interpreter to bfloat16 towards zero.
    torch.testing.assert_close(pooled.float(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps)
    weight = torch.randn_like(pooled)
    gradients = torch.autograd.grad(pooled, features, weight)
    exact_gradients = torch.autograd.grad(expected, exact, weight.float())
    for gradient, other in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), other, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_training_sees_the_values_of_inference() -> None:
    features, regions = pyramid(8), random_regions(8, 3)
    options: Options = {"output_size": 2, "sampling_ratio": 2, "aligned": True}
    without = roi_align(features, STRIDES, *regions, **options)
    trained = roi_align([feature.requires_grad_() for feature in features], STRIDES, *regions, **options)
    with torch.no_grad():
        evaluated = roi_align(features, STRIDES, *regions, **options)
    assert (without.grad_fn, evaluated.grad_fn) == (None, None)
    assert trained.requires_grad
    assert torch.equal(without, trained.detach())
    assert without.is_contiguous(memory_format=torch.channels_last)


def test_no_boxes_pool_to_nothing_and_hand_nothing_back() -> None:
    features = [feature.requires_grad_() for feature in pyramid(9)]
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    boxes = torch.zeros(0, 4, device=DEVICE)
    pooled = roi_align(features, STRIDES, boxes, none, none, output_size=7, sampling_ratio=2, aligned=True)
    assert pooled.shape == (0, 3, 7, 7)
    assert not any(gradient.any() for gradient in torch.autograd.grad(pooled.sum(), features))


@pytest.mark.parametrize(("num_levels", "num_strides"), [(4, 3), (0, 0), (5, 5)])
def test_refuses_levels_it_cannot_take(num_levels: int, num_strides: int) -> None:
    features = [pyramid(10, num_levels=1)[0]] * num_levels
    with pytest.raises(ValueError, match=str(num_levels)):
        roi_align(features, [4] * num_strides, *random_regions(10, 1), output_size=2, sampling_ratio=2, aligned=True)


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from model.kernels.roi_bins import add_gradients, pool_rows

ratio, maps = int(sys.argv[1]), sys.argv[2]
types = {"boxes": "*fp32", "image_index": "*i64", "level_index": "*i64", "pooled": maps, "gradient": maps}
for level in range(4):
    types |= {f"height_{level}": "i32", f"width_{level}": "i32", f"scale_{level}": "fp32"}
common = {"C": 256, "S": 7, "T": ratio, "ALIGNED": True, "BLOCK": 256, "SUM": tl.float32}
for kernel, own in ((pool_rows, {"ROWS": 4}), (add_gradients, {"GROUPS": 8, "COLUMNS": 8})):
    types |= {f"level_{level}": maps if kernel is pool_rows else "*fp32" for level in range(4)}
    constants = common | own
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
"""


@pytest.mark.slow  # a compiler starts anew for each
@pytest.mark.parametrize(("sampling_ratio", "dtype"), [(2, "*bf16"), (0, "*fp32")])
def test_compiles_for_hopper(sampling_ratio: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.backends.nvidia")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    script = tmp_path / "compile_kernels.py"  # a file: Triton reads the sources of what it compiles
    script.write_text(COMPILE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    run = subprocess.run(
        [sys.executable, str(script), str(sampling_ratio), dtype],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr

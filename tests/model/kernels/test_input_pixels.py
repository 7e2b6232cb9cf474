from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from model.kernels import input_pixels
from model.kernels.input_pixels import Staging, lay_out
from model.recipe import Recipe
from model.structures import ImageSize
from model.transform import to_input
from tests.model.conftest import drawn_image
from tests.reference.input_pixels import input_pixels as one_by_one

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECIPE = Recipe()
GREYS = replace(RECIPE, pixel_range=1.0, pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0))

Image = NDArray[np.uint8]
# an image's sides, and those it is resized to
Sides = tuple[int, int, int, int]
SIDES = st.tuples(*[st.integers(1, 9)] * 4)


def _poisoned(num_images: int, padded: ImageSize, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty((num_images, 3, *padded), dtype=dtype, device=DEVICE, memory_format=torch.channels_last)
    return out.fill_(torch.nan)


def _laid_out(
    images: Sequence[Image],
    sizes: Sequence[ImageSize],
    padded: ImageSize,
    *,
    recipe: Recipe = RECIPE,
    dtype: torch.dtype = torch.float32,
    size_dtype: torch.dtype = torch.int32,
) -> Tensor:
    pixels, offsets = Staging(1, DEVICE).send(images)
    out = _poisoned(len(images), padded, dtype)
    image_sizes = torch.tensor([image.shape[:2] for image in images], dtype=size_dtype, device=DEVICE)
    resized_sizes = torch.tensor(sizes, dtype=size_dtype, device=DEVICE)
    lay_out(pixels, offsets, image_sizes, resized_sizes, out, recipe=recipe)
    return out.cpu()


def _drawn(sides: Sequence[Sides]) -> tuple[list[Image], list[ImageSize], ImageSize]:
    """Images, the sizes they are resized to, and a padded size with room around the largest."""
    images = [drawn_image(height, width, seed=seed) for seed, (height, width, _, _) in enumerate(sides)]
    sizes = [ImageSize(height, width) for _, _, height, width in sides]
    return images, sizes, ImageSize(max(size.height for size in sizes) + 2, max(size.width for size in sizes) + 1)


@pytest.fixture
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a tiny input is then the work of several programs."""
    monkeypatch.setattr(input_pixels, "ROWS", 4)
    monkeypatch.setattr(input_pixels, "ELEMENTS", 16)


def test_two_by_two_to_four_by_four_by_hand() -> None:
    # centres of four lie at -0.25, 0.25, 0.75 and 1.25 of two; what is outside takes the nearest pixel
    image = np.array([[[0, 1, 2], [64, 65, 66]], [[128, 129, 130], [192, 193, 194]]], dtype=np.uint8)
    along_x = torch.tensor([0.0, 16.0, 48.0, 64.0])
    along_y = torch.tensor([0.0, 32.0, 96.0, 128.0])
    plane = along_y[:, None] + along_x
    expected = torch.zeros(1, 3, 5, 6)
    expected[0, :, :4, :4] = torch.stack([plane, plane + 1, plane + 2])
    assert torch.equal(_laid_out([image], [ImageSize(4, 4)], ImageSize(5, 6), recipe=GREYS), expected)


def test_normalised_by_hand() -> None:
    image = np.full((1, 1, 3), (255, 0, 51), dtype=np.uint8)
    colour = torch.tensor([(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    expected = colour[:, None, None].expand(3, 2, 3)
    torch.testing.assert_close(_laid_out([image], [ImageSize(2, 3)], ImageSize(2, 3))[0], expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("_small_programs")
@pytest.mark.parametrize(
    "sides",
    [
        (5, 7, 5, 7),  # as it is
        (5, 4, 9, 11),
        (13, 17, 4, 6),
        (3, 20, 9, 5),  # higher and narrower
        (1, 1, 6, 5),
        (9, 8, 1, 1),
        (1, 30, 2, 20),
        (30, 1, 20, 2),
    ],
)
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_agrees_with_torch_and_with_a_slow_loop(sides: Sides, order: str) -> None:
    recipe = replace(RECIPE, channel_order=order)  # type: ignore[arg-type]
    images, sizes, padded = _drawn([sides])
    ours = _laid_out(images, sizes, padded, recipe=recipe)
    torchs = to_input(images, sizes, padded=padded, recipe=recipe, device=DEVICE).cpu()
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-5)
    slow = torch.from_numpy(one_by_one(images[0], sizes[0], padded, recipe)).float()
    torch.testing.assert_close(ours[0], slow, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(SIDES, min_size=1, max_size=3), st.sampled_from([torch.int32, torch.int64]))
def test_images_of_a_batch_do_not_touch(sides: list[Sides], size_dtype: torch.dtype) -> None:
    images, sizes, padded = _drawn(sides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_pixels, "ELEMENTS", 32)
        ours = _laid_out(images, sizes, padded, size_dtype=size_dtype)
    expected = to_input(images, sizes, padded=padded, recipe=RECIPE, device=DEVICE).cpu()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert torch.equal(ours == 0, expected == 0)  # not nearly zero around the images: zero


def test_bfloat16_is_rounded_once() -> None:
    images, sizes, padded = _drawn([(6, 5, 9, 8), (7, 9, 4, 5)])
    ours = _laid_out(images, sizes, padded, dtype=torch.bfloat16)
    exact = to_input(images, sizes, padded=padded, recipe=RECIPE, device=DEVICE).cpu()
    # half a step of eight bits; Triton's interpreter cuts bits off, so a whole one
    step = 2**-8 if DEVICE.type == "cuda" else 2**-7
    assert ((ours.float() - exact).abs() <= step * exact.abs() + 1e-5).all()


def test_a_batch_may_be_short() -> None:
    images, sizes, padded = _drawn([(4, 6, 8, 9), (5, 5, 3, 3)])
    expected = _laid_out(images, sizes, padded)
    image_sizes = torch.tensor([(4, 6), (0, 0), (5, 5)], device=DEVICE)
    resized_sizes = torch.tensor([sizes[0], (0, 0), sizes[1]], device=DEVICE)
    pixels, offsets = Staging(1, DEVICE).send(images)
    out = _poisoned(3, padded)
    nowhere = torch.full((1,), 2**62, device=DEVICE)
    lay_out(pixels, torch.cat([offsets[:1], nowhere, offsets[1:]]), image_sizes, resized_sizes, out, recipe=RECIPE)
    assert torch.equal(out[[0, 2]].cpu(), expected)
    assert not out[1].any()


def test_what_it_cannot_do_is_refused() -> None:
    image, size = drawn_image(3, 3), ImageSize(4, 4)
    with pytest.raises(ValueError, match="resize must be 'torchvision'"):
        _laid_out([image], [size], size, recipe=replace(RECIPE, resize="detectron2"))
    pixels, offsets = Staging(1, DEVICE).send([image])
    sizes = torch.tensor([size], device=DEVICE)
    with pytest.raises(ValueError, match="channels last"):
        lay_out(pixels, offsets, sizes, sizes, torch.empty((1, 3, 4, 4), device=DEVICE), recipe=RECIPE)
    with pytest.raises(ValueError, match="a row for each of 2 images"):
        lay_out(pixels, offsets, sizes, sizes, _poisoned(2, size), recipe=RECIPE)


def test_staging_lays_images_end_to_end() -> None:
    plain, other = drawn_image(3, 5), drawn_image(4, 2, seed=1)
    frozen = plain.copy()
    frozen.setflags(write=False)
    images = [frozen, np.ascontiguousarray(other[::-1])[::-1], np.asfortranarray(plain)]
    pixels, offsets = Staging(10, DEVICE).send(images)  # grows from ten bytes
    assert offsets.tolist() == [0, 45, 69]
    assert offsets.dtype == torch.int64
    assert pixels.tolist() == [*plain.ravel(), *other.ravel(), *plain.ravel()]


def test_what_was_sent_stays_when_the_buffer_is_filled_again() -> None:
    staging = [Staging(1 << 20, DEVICE) for _ in range(2)]
    images = [np.full((500, 500, 3), number, np.uint8) for number in range(8)]
    sent = [staging[number % 2].send([image])[0] for number, image in enumerate(images)]
    for number, pixels in enumerate(sent):
        assert len(pixels) == 500 * 500 * 3
        assert (pixels == number).all()


def test_staging_writes_into_what_it_is_given() -> None:
    image = drawn_image(2, 3)
    into = torch.zeros(30, dtype=torch.uint8, device=DEVICE), torch.full((3,), -1, device=DEVICE)
    pixels, offsets = Staging(100, DEVICE).send([image, image[:1]], into=into)
    assert pixels is into[0]
    assert offsets is into[1]
    assert pixels.tolist() == [*image.ravel(), *image[:1].ravel(), 0, 0, 0]
    assert offsets.tolist() == [0, 18, -1]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from model.kernels.input_pixels import ELEMENTS, ROWS, lay_out_rows

for element in ("bf16", "fp32"):
    types = {"pixels": "*u8", "offsets": "*i64", "image_sizes": "*i32", "resized_sizes": "*i32", "out": "*" + element}
    types |= {"padded_height": "i32", "padded_width": "i32"}
    types |= {f"{name}_{channel}": "fp32" for name in ("gain", "bias") for channel in range(3)}
    constants = {"bgr": True, "num_rows": ROWS, "num_elements": ELEMENTS}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(7)}
    source = triton.compiler.ASTSource(
        fn=lay_out_rows, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    assert kernel.asm["cubin"]
    assert "st.global.v4.b32" in kernel.asm["ptx"], "not sixteen bytes a store"
"""


@pytest.mark.slow  # a compiler starts anew for each
def test_compiles_for_hopper_and_stores_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    # where Triton interprets, it does not compile: a process of its own
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
def test_whole_photographs_agree_with_torch() -> None:
    images = [drawn_image(*shape, seed=seed) for seed, shape in enumerate([(480, 640), (1200, 1600), (427, 640)])]
    sizes, padded = [ImageSize(800, 1066), ImageSize(800, 1066), ImageSize(800, 1199)], ImageSize(800, 1216)
    ours = _laid_out(images, sizes, padded)
    expected = to_input(images, sizes, padded=padded, recipe=RECIPE, device=DEVICE).cpu()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_graph_takes_other_images() -> None:
    padded = ImageSize(64, 96)
    into = torch.zeros(100_000, dtype=torch.uint8, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    image_sizes, resized_sizes = (torch.ones((2, 2), dtype=torch.int64, device=DEVICE) for _ in range(2))
    out = _poisoned(2, padded)
    lay_out(*into, image_sizes, resized_sizes, out, recipe=RECIPE)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lay_out(*into, image_sizes, resized_sizes, out, recipe=RECIPE)
    staging = Staging(100_000, DEVICE)
    for sides in ([(20, 30, 60, 90), (50, 40, 64, 51)], [(100, 110, 58, 64), (7, 9, 64, 82)]):
        images = [drawn_image(height, width, seed=height) for height, width, _, _ in sides]
        sizes = [ImageSize(height, width) for _, _, height, width in sides]
        staging.send(images, into=into)
        image_sizes.copy_(torch.tensor([image.shape[:2] for image in images]))
        resized_sizes.copy_(torch.tensor(sizes))
        out.fill_(torch.nan)
        graph.replay()
        expected = to_input(images, sizes, padded=padded, recipe=RECIPE, device=DEVICE)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5, check_stride=False)

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import compiled_winograd
from model.compiled_winograd import LARGEST_NORM, TILE, CompiledWinograd, can_compute
from model.conv_norm import ConvNorm
from model.winograd import transforms
from tests.model.conftest import conv_3x3, convolve, needs_compiled

ROOT = Path(__file__).parents[2]
POINTS = TILE + 2
MAPS = {
    "num_images": st.integers(1, 3),
    "channels": st.sampled_from([16, 32, 48]),
    "outputs": st.sampled_from([32, 96]),
    "height": st.integers(1, 17),
    "width": st.integers(1, 17),
}


def compiled(conv: nn.Conv2d, *, in_integers: bool) -> CompiledWinograd:
    return CompiledWinograd(conv.weight, conv.bias, in_integers=in_integers)


def _by_slow_loop(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The definition, tile by tile, exact but for the integers; no sum of them may leave 32 bits."""
    of_inputs, of_kernel, of_outputs = transforms(TILE)
    kernels = torch.einsum("ip,jq,kcpq->ijkc", of_kernel, of_kernel, conv.weight.double())
    weights, weight_units = _quantised(kernels)  # (P, P, K, C), (P, P, K)
    num_images, _, height, width = x.shape
    padded = F.pad(x.double(), (1, POINTS, 1, POINTS))
    y = torch.zeros(num_images, conv.out_channels, height + POINTS, width + POINTS, dtype=torch.float64)
    for image in range(num_images):
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                inputs = padded[image, :, top : top + POINTS, left : left + POINTS]
                at_points, units = _quantised(torch.einsum("ip,jq,cpq->ijc", of_inputs, of_inputs, inputs))
                assert torch.einsum("ijkc,ijc->ijk", weights.abs(), at_points.abs()).max() < 2**31
                sums = torch.einsum("ijkc,ijc->ijk", weights, at_points) * weight_units * units[..., None]
                outputs = torch.einsum("pi,qj,ijk->kpq", of_outputs, of_outputs, sums)
                y[image, :, top : top + TILE, left : left + TILE] = outputs
    y = y[:, :, :height, :width]
    return y if conv.bias is None else y + conv.bias[:, None, None]


def _quantised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, and what one is worth, of vectors (…, C)."""
    units = torch.maximum(vectors.norm(dim=-1) / LARGEST_NORM, vectors.abs().amax(dim=-1) / 32767)
    return (vectors / units.clamp(min=1e-37)[..., None]).round(), units


@needs_compiled
@settings(deadline=None, max_examples=60)
@given(
    **MAPS,
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e12]),
    bias=st.booleans(),
    bf16=st.booleans(),
)
@torch.inference_mode()
def test_it_is_the_slow_loop(
    num_images: int, channels: int, outputs: int, height: int, width: int, scale: float, bias: bool, bf16: bool
) -> None:
    """But for the few values so near the middle of two whole numbers that float32 rounds to the other."""
    torch.manual_seed(0)
    conv = conv_3x3(channels, outputs, bias=bias)
    if conv.bias is not None:
        conv.bias.mul_(scale)
    x = (torch.randn(num_images, channels, height, width) * scale).to(torch.bfloat16 if bf16 else torch.float32)
    found = compiled(conv, in_integers=True)(x, None, relu=False)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = _by_slow_loop(x, conv)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-3 * scale)
    assert float((found - expected).norm()) < 0.4 * float((found - convolve(x, conv)).norm())


@needs_compiled
@settings(deadline=None, max_examples=60)
@given(
    **MAPS,
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    bf16=st.booleans(),
)
@torch.inference_mode()
def test_in_float32_it_is_the_plain_sum(
    num_images: int, channels: int, outputs: int, height: int, width: int, scale: float, bf16: bool
) -> None:
    torch.manual_seed(0)
    conv = conv_3x3(channels, outputs)
    x = (torch.randn(num_images, channels, height, width) * scale).to(torch.bfloat16 if bf16 else torch.float32)
    found = compiled(conv, in_integers=False)(x, None, relu=False)
    torch.testing.assert_close(found.double(), convolve(x, conv), rtol=1e-6, atol=3e-5 * scale)


@needs_compiled
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plus_in", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_sum_and_the_relu_come_before_the_one_rounding(out: torch.dtype, plus_in: torch.dtype) -> None:
    torch.manual_seed(0)
    conv, x, plus = conv_3x3(64, 64), torch.randn(2, 64, 23, 18), torch.randn(2, 64, 23, 18).to(plus_in)
    bare = compiled(conv, in_integers=True)(x, None, relu=False)
    found = CompiledWinograd(conv.weight, conv.bias, in_integers=True, dtype=out)(x, plus, relu=True)
    assert torch.equal(found, (bare + plus).relu().to(out))
    assert torch.equal(
        CompiledWinograd(conv.weight, conv.bias, in_integers=True, dtype=out)(x, plus, relu=False),
        (bare + plus).to(out),
    )


@needs_compiled
@torch.inference_mode()
def test_it_rounds_less_than_bfloat16() -> None:
    """The root mean square over outputs that spread by one, of the channels that pyramids have."""
    torch.manual_seed(0)
    conv, x = conv_3x3(256, 64, bias=False), torch.randn(1, 256, 53, 67).bfloat16()
    expected = convolve(x, conv)

    def error_of(y: Tensor) -> float:
        return float((y - expected).square().mean().sqrt())

    by_bfloat16 = error_of(F.conv2d(x, conv.weight.bfloat16(), padding=1))
    rounded, precise = (
        error_of(CompiledWinograd(conv.weight, conv.bias, in_integers=True, dtype=dtype)(x, None, relu=False))
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert 1.3e-3 < precise < 1.5e-3 < rounded < 2.2e-3 < by_bfloat16 < 2.5e-3
    assert 2e-6 < error_of(compiled(conv, in_integers=False)(x, None, relu=False)) < 4e-6


@needs_compiled
@pytest.mark.parametrize("channels", [16, 256, 2048])
@torch.inference_mode()
def test_no_sum_overflows_where_inputs_and_kernel_are_one_vector(channels: int) -> None:
    """Where Cauchy's bound is reached."""
    vector = torch.randn(channels, generator=torch.Generator().manual_seed(0))
    conv = nn.Conv2d(channels, 64, 3, padding=1, bias=False).requires_grad_(False)
    conv.weight[:] = vector[None, :, None, None]
    x = vector.view(1, -1, 1, 1).expand(1, channels, 12, 11)
    expected = convolve(x, conv)
    found = compiled(conv, in_integers=True)(x, None, relu=False)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 * float(expected.max()))


@needs_compiled
@torch.inference_mode()
def test_one_channel_alone_fits_sixteen_bits() -> None:
    conv, x = conv_3x3(64, 64, bias=False), torch.zeros(1, 64, 10, 10)
    x[:, 5] = 1e6
    expected = convolve(x, conv)
    found = compiled(conv, in_integers=True)(x, None, relu=False)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@needs_compiled
@pytest.mark.parametrize("in_integers", [True, False])
@torch.inference_mode()
def test_an_image_is_computed_the_same_whatever_is_beside_it(in_integers: bool) -> None:
    """To the bit: in any batch, by any number of threads."""
    torch.manual_seed(0)
    layer, x = compiled(conv_3x3(32, 64), in_integers=in_integers), torch.randn(40, 32, 14, 14)
    together = layer(x, None, relu=True)
    alone = torch.cat([layer(one[None], None, relu=True) for one in x])
    assert torch.equal(together, alone)
    before = torch.get_num_threads()
    try:
        for threads in (2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(layer(x, None, relu=True), together)
    finally:
        torch.set_num_threads(before)


@needs_compiled
@pytest.mark.parametrize("in_integers", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("row", "column"), [(7, 12), (9, 14), (10, 15), (0, 0)])
@torch.inference_mode()
def test_what_is_not_finite_is_seen_in_its_tiles_and_nowhere_else(
    in_integers: bool, value: float, row: int, column: int
) -> None:
    torch.manual_seed(0)
    layer, x = compiled(conv_3x3(16, 64), in_integers=in_integers), torch.randn(1, 16, 20, 20)
    clean = layer(x, None, relu=False)
    x[0, 3, row, column] = value
    found = layer(x, None, relu=False)[0]
    sees = torch.zeros(20, 20, dtype=torch.bool)  # the outputs that hang on it
    sees[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
    tiles = sees.view(4, 5, 4, 5).any(dim=3).any(dim=1)
    own = tiles.repeat_interleave(5, dim=0).repeat_interleave(5, dim=1)
    assert not found[:, sees].isfinite().any()
    assert torch.equal(found[:, ~own], clean[0, :, ~own])


@needs_compiled
@torch.inference_mode()
def test_nothing_and_next_to_nothing_are_zero() -> None:
    conv = conv_3x3(16, 64, bias=False)
    layer = CompiledWinograd(conv.weight, conv.bias, in_integers=True)
    assert not layer(torch.zeros(1, 16, 9, 9), None, relu=False).any()
    assert not layer(torch.full((1, 16, 9, 9), 1e-42), None, relu=False).any()
    assert layer(torch.zeros(0, 16, 9, 9), None, relu=False).shape == (0, 64, 9, 9)
    conv.weight.zero_()
    assert not compiled(conv, in_integers=True)(torch.ones(1, 16, 9, 9), None, relu=False).any()


@needs_compiled
@pytest.mark.parametrize("in_integers", [True, False])
def test_it_stands_for_plain_convolutions_of_whole_groups(in_integers: bool) -> None:
    assert can_compute(conv_3x3(256, 256), in_integers=in_integers)
    assert can_compute(conv_3x3(16, 32), in_integers=in_integers)
    assert not can_compute(conv_3x3(24, 64), in_integers=in_integers)
    assert not can_compute(conv_3x3(64, 80), in_integers=in_integers)
    assert not can_compute(nn.Conv2d(256, 256, 3, padding=1, stride=2), in_integers=in_integers)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Where the library is looked for again."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    compiled_winograd._library.cache_clear()
    yield monkeypatch
    compiled_winograd._library.cache_clear()


def test_where_it_was_not_compiled_it_stands_for_nothing(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr("importlib.util.find_spec", lambda _: None)
    assert not can_compute(nn.Conv2d(256, 256, 3, padding=1), in_integers=False)
    assert compiled_winograd.why_missing() == "it was not compiled"
    fresh.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert compiled_winograd.why_missing() is None


def test_a_file_that_does_not_load_is_left_alone(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    fresh.setattr("importlib.util.find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "broken.so")))
    assert not can_compute(nn.Conv2d(256, 256, 3, padding=1), in_integers=True)
    assert "broken.so" in str(compiled_winograd.why_missing())


@needs_compiled
def test_a_file_of_another_version_is_left_alone(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(compiled_winograd, "VERSION", -1)
    assert not can_compute(nn.Conv2d(256, 256, 3, padding=1), in_integers=True)
    assert compiled_winograd.why_missing() == "it was compiled from another version"


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="wants GCC")
def test_where_there_is_gcc_it_was_compiled() -> None:
    """Lest all else here be left out without a word."""
    assert compiled_winograd.why_missing() is None


@needs_compiled
def test_short_memory_is_said() -> None:
    script = """
import resource, torch
from torch import nn
from model.compiled_winograd import CompiledWinograd
conv = nn.Conv2d(16384, 32, 3, padding=1)
layer = CompiledWinograd(conv.weight, conv.bias, in_integers=True)
few, many = (torch.zeros(n, 8, 8, 16384).permute(0, 3, 1, 2) for n in (1, 20))
layer(few, None, relu=False)  # whose threads have begun
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used, used))
layer(many, None, relu=False)
"""
    found = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 1
    assert "MemoryError: no memory to convolve maps (20, 16384, 8, 8)" in found.stderr


@needs_compiled
@pytest.mark.parametrize(("in_integers", "atol"), [(True, 2e-2), (False, 2e-5)])
@torch.inference_mode()
def test_a_layer_that_has_it_is_the_layer(in_integers: bool, atol: float) -> None:
    torch.manual_seed(0)
    layer = ConvNorm(16, 64, kernel_size=3)
    x, plus = torch.randn(1, 16, 44, 52), torch.randn(1, 64, 44, 52)
    expected, with_sum = layer(x), layer(x, plus)
    layer.winograd = CompiledWinograd(layer.conv.weight, layer.conv.bias, in_integers=in_integers)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=atol)
    torch.testing.assert_close(layer(x, plus), with_sum, rtol=0, atol=atol)
    assert not torch.equal(layer(x), expected)  # by the other way, then

"""The fused forms against the layers they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.fused_conv import (
    cudnn_conv,
    fused_linear,
    fused_stem,
    linear_in_float32,
    onednn_conv,
    pointwise_in_float32,
    pointwise_together,
    stem_on_cells,
)

CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize(("height", "width"), [(2, 2), (32, 64), (6, 10)])
def test_the_stem_on_cells_is_the_stem(height: int, width: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3).double()
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    cells, weight = stem_on_cells(conv.weight, images)
    found = F.conv2d(cells, weight, conv.bias, padding=2)[:, :, :-1, :-1]
    torch.testing.assert_close(found, conv(images))
    bordered, weight = stem_on_cells(conv.weight, images, border=(2, 1))
    torch.testing.assert_close(F.conv2d(bordered, weight, conv.bias), conv(images))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize(("kernel_size", "stride", "groups"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_fused_convolution_on_the_cpu_is_its_parts(
    relu: bool, with_sum: bool, kernel_size: int, stride: int, groups: int, dtype: torch.dtype
) -> None:
    if groups > 1 and with_sum:
        pytest.skip("no network has that")
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups)
    assert conv.bias is not None
    conv.weight.data = conv.weight.to(dtype, memory_format=CHANNELS_LAST)
    x = torch.randn(2, 16, 9, 14).to(dtype).to(memory_format=CHANNELS_LAST)
    expected = F.conv2d(
        x.double(),
        conv.weight.double(),
        conv.bias.double(),
        stride,
        kernel_size // 2,
        groups=groups,
    )
    plus = torch.randn_like(expected).to(dtype).to(memory_format=CHANNELS_LAST) if with_sum else None
    expected = expected if plus is None else expected + plus
    found = onednn_conv(conv, x, plus, relu=relu)
    assert found.dtype == dtype
    assert plus is None or found.data_ptr() == plus.data_ptr()  # the sum takes its place
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-8, 1e-3)  # one rounding, and that of a bias
    torch.testing.assert_close(found.double(), expected.relu() if relu else expected, rtol=rtol, atol=atol)


@torch.inference_mode()
def test_a_sum_with_maps_of_another_dtype_leaves_them_as_they_are() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel_size=3, padding=1)
    conv.weight.data = conv.weight.bfloat16()
    x, plus = torch.randn(1, 4, 5, 5).bfloat16(), torch.randn(1, 6, 5, 5)
    before = plus.clone()
    found = onednn_conv(conv, x, plus, relu=False)
    assert found.dtype == torch.bfloat16
    assert torch.equal(plus, before)
    expected = F.conv2d(x.float(), conv.weight.float(), conv.bias, padding=1) + plus
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-2)


@torch.inference_mode()
def test_no_maps_are_fused_with_none() -> None:
    conv = nn.Conv2d(4, 6, kernel_size=3, padding=1)
    for plus in (None, torch.zeros(0, 6, 5, 5)):
        assert onednn_conv(conv, torch.zeros(0, 4, 5, 5), plus, relu=True).shape == (0, 6, 5, 5)


@torch.inference_mode()
def test_a_fused_convolution_of_another_dtype_takes_that_of_its_weight() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel_size=3, padding=1)
    x = torch.randn(1, 4, 5, 5)
    found = onednn_conv(conv, x.bfloat16(), None, relu=False)
    torch.testing.assert_close(found, conv(x.bfloat16().float()), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_fused_linear_layers_on_the_cpu_are_their_parts() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 24), torch.randn(33, 40)
    found = fused_linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, layer(x).relu(), rtol=1e-5, atol=1e-5)
    assert fused_linear(x[:0], layer.weight, layer.bias).shape == (0, 24)
    convs = [nn.Conv2d(16, 3, 1), nn.Conv2d(16, 12, 1)]
    maps = torch.randn(2, 16, 5, 7)
    for part, conv in zip(pointwise_in_float32(convs, maps), convs, strict=True):
        torch.testing.assert_close(part.permute(0, 3, 1, 2), conv(maps), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_convolution_is_its_parts(
    relu: bool, with_sum: bool, kernel_size: int, stride: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv = (
        nn.Conv2d(16, 24, kernel_size, stride=stride, padding=kernel_size // 2).cuda().to(memory_format=CHANNELS_LAST)
    )
    conv, x = conv.to(dtype), torch.randn(2, 16, 9, 14, device="cuda", dtype=dtype).to(memory_format=CHANNELS_LAST)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        expected = conv(x)
        plus = torch.randn_like(expected) if with_sum else None
        expected = expected if plus is None else expected + plus
        # what a freed map leaves must not come through: cuDNN is given the output as a summand times zero
        torch.full_like(expected, float("nan"))
        found = cudnn_conv(conv, x, plus, relu=relu)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(found, expected.relu() if relu else expected, rtol=rtol, atol=atol)


@pytest.mark.gpu
def test_fused_linear_layers_and_stem_are_their_parts() -> None:
    torch.manual_seed(0)
    layer, conv = nn.Linear(40, 24).cuda(), nn.Conv2d(3, 64, 7, stride=2, padding=3).cuda()
    x, images = torch.randn(33, 40, device="cuda"), torch.randn(2, 3, 64, 96, device="cuda")
    images = images.to(memory_format=CHANNELS_LAST)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.testing.assert_close(fused_linear(x, layer.weight, layer.bias), layer(x).relu(), rtol=1e-4, atol=1e-5)
        expected = F.max_pool2d(conv(images).relu(), kernel_size=3, stride=2, padding=1)
        torch.testing.assert_close(fused_stem(conv, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_products_in_bfloat16_keep_sixteen_bits_of_the_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256, device="cuda").to(torch.bfloat16)
    weight, bias = torch.randn(91, 256, device="cuda"), torch.randn(91, device="cuda")
    exact = x.double() @ weight.double().t() + bias.double()
    error = (linear_in_float32(x, weight, bias) - exact).norm() / exact.norm()
    assert error < 2e-5


def test_products_beside_each_other_are_each_by_itself_gradients_too() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, count, 1).double() for count in (3, 12)]
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64).to(memory_format=CHANNELS_LAST).requires_grad_()
    of = [x, *(one for conv in convs for one in conv.parameters())]
    found = pointwise_together(convs, x)
    expected = [conv(x).permute(0, 2, 3, 1) for conv in convs]
    weights = [torch.randn_like(one) for one in expected]
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad([(y * weight).sum() for y, weight in zip(outputs, weights, strict=True)], of)
        for outputs in (found, expected)
    ]
    torch.testing.assert_close(*gradients)

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from model.conv_norm import ConvNorm, folded
from model.norm import norm_of


def _conv_norm(eps: float, *, stride: int = 1) -> ConvNorm:
    torch.manual_seed(0)
    module = ConvNorm(6, 8, kernel_size=3, stride=stride, norm=norm_of("batch", eps)).eval()
    assert module.norm is not None
    for name, low, high in (("weight", -1, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.1, 3)):
        getattr(module.norm, name).data.uniform_(low, high)
    return module


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("stride", [1, 2])
@torch.inference_mode()
def test_folding_keeps_the_function(eps: float, stride: int) -> None:
    module = _conv_norm(eps, stride=stride)
    x = torch.randn(2, 6, 9, 10)
    torch.testing.assert_close(folded(module)(x), module(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_folding_by_hand() -> None:
    module = ConvNorm(1, 1, kernel_size=1, norm=norm_of("frozen", 1.0), relu=False)
    assert module.norm is not None
    nn.init.constant_(module.conv.weight, 3.0)
    for name, value in (("weight", 4.0), ("bias", 1.0), ("running_mean", 2.0), ("running_var", 3.0)):
        module.norm.get_buffer(name).fill_(value)
    conv = folded(module).conv
    assert conv.bias is not None
    # (3 x - 2) / sqrt(3 + 1) * 4 + 1 = 6 x - 3
    assert (conv.weight.item(), conv.bias.item()) == (6.0, -3.0)


def test_in_half_precision_a_frozen_norm_goes_into_weights_that_are_trained_on() -> None:
    module = ConvNorm(6, 8, kernel_size=3, norm=norm_of("frozen", 1e-5))
    torch.manual_seed(0)
    assert module.norm is not None
    for name, low, high in (("weight", -1, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.1, 3)):
        module.norm.get_buffer(name).uniform_(low, high)
    x = torch.randn(2, 6, 9, 10)
    found = []
    for enabled in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            maps = module(x)
        assert maps.dtype == (torch.bfloat16 if enabled else torch.float32)
        maps.float().square().sum().backward()
        assert module.conv.weight.grad is not None
        found.append((maps.detach().float(), module.conv.weight.grad.clone()))
    for value, half in zip(*found, strict=True):
        assert (value - half).norm() <= 0.01 * value.norm()


def test_folding_leaves_the_original_alone() -> None:
    module = nn.Sequential(_conv_norm(1e-5))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    folded(module)
    assert module[0].norm is not None
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_size_is_kept_at_stride_one() -> None:
    for kernel_size in (1, 3, 7):
        module = ConvNorm(2, 3, kernel_size=kernel_size)
        assert module(torch.zeros(1, 2, 5, 8)).shape == (1, 3, 5, 8)


@pytest.mark.parametrize("kind", ["frozen", "batch", None])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("num_images", [2, 0])
def test_sums_by_a_kernel_are_torchs(
    kind: Literal["frozen", "batch"] | None, relu: bool, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "batch" and num_images == 0:
        pytest.skip("a batch norm refuses no values")
    pytest.importorskip("triton")
    torch.manual_seed(0)
    module = ConvNorm(6, 8, kernel_size=3, norm=None if kind is None else norm_of(kind, 1e-5), relu=relu)
    module.to(memory_format=torch.channels_last)
    x, plus = (torch.randn(num_images, channels, 9, 10) for channels in (6, 8))
    found = []
    for by_kernel in (False, True):
        monkeypatch.setattr("model.conv_norm.run_kernels_on", lambda _, by_kernel=by_kernel: by_kernel)
        module.zero_grad()
        shortcut = plus.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            maps = module(x.contiguous(memory_format=torch.channels_last), shortcut * 1)
        maps.float().square().sum().backward()
        assert shortcut.grad is not None
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        found.append([maps.detach().float(), shortcut.grad, *grads])
    assert len(found[0]) == len(found[1]) > 2
    for theirs, ours in zip(*found, strict=True):
        assert (theirs - ours).norm() <= 0.02 * theirs.norm()

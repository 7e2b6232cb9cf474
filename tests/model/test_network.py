from __future__ import annotations

import copy
from typing import TypeGuard

import pytest
import torch
from torch import nn

from model import MaskRCNN, compiled_winograd, network
from model.compiled_winograd import CompiledWinograd
from model.config import ModelConfig
from model.conv_norm import ConvNorm
from model.mask_head import MaskHead
from model.network import Network, Precision, build_network, ready_to_run
from model.recipe import Recipe
from model.winograd import Winograd
from tests.model.conftest import needs_compiled

CPU = torch.device("cpu")


def test_what_runs_is_a_copy(small_net: MaskRCNN) -> None:
    before = {name: value.clone() for name, value in small_net.network.state_dict().items()}
    running = ready_to_run(small_net.network, CPU, "bf16", exact=False)
    for value in running.parameters():
        value.zero_()
    after = small_net.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_folded_networks_have_no_norms(small_net: MaskRCNN) -> None:
    folded = ready_to_run(small_net.network, CPU, "fp32", exact=False)
    exact = ready_to_run(small_net.network, CPU, "fp32", exact=True)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in exact.modules())


@torch.inference_mode()
def test_folding_keeps_every_part(small_net: MaskRCNN) -> None:
    folded = ready_to_run(small_net.network, CPU, "fp32", exact=False)
    exact = ready_to_run(small_net.network, CPU, "fp32", exact=True)
    torch.manual_seed(0)
    for one, other in zip(folded.features(IMAGES), exact.features(IMAGES), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    regions = torch.randn(5, 128, 7, 7)
    for one, other in zip(folded.box_head(regions), exact.box_head(regions), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


IMAGES = torch.linspace(-2, 2, 2 * 3 * 64 * 96).view(2, 3, 64, 96)


@pytest.mark.parametrize("has_tiles", [False, True])
def test_in_bf16_what_boxes_hang_on_stays_float32(
    small_net: MaskRCNN, monkeypatch: pytest.MonkeyPatch, has_tiles: bool
) -> None:
    """The RPN only where bfloat16 is not many times as fast."""
    monkeypatch.setattr(network, "has_bf16_tiles", lambda: has_tiles)
    monkeypatch.setattr(compiled_winograd, "_library", lambda: None)
    running = ready_to_run(small_net.network, CPU, "bf16", exact=False)
    full = {name for name, value in running.named_parameters() if value.dtype == torch.float32}
    precise: tuple[str, ...] = ("body.stem.", "box_head.fcs.1.", "box_head.class_logits.", "box_head.deltas.", "rpn.")
    precise = precise[: -1 if has_tiles else None]
    biases = {f"{name}.conv.bias" for name, part in running.named_modules() if isinstance(part, ConvNorm)}
    assert full == {name for name, _ in running.named_parameters() if name.startswith(precise)} | biases
    assert {value.dtype for value in small_net.running.parameters()} == {torch.float32}


@torch.inference_mode()
def test_without_onednn_bf16_is_the_same_within_rounding(small_net: MaskRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = ready_to_run(small_net.network, CPU, "bf16", exact=False)
    monkeypatch.setattr(network, "can_fuse_on_cpu", lambda _: False)
    plain = ready_to_run(small_net.network, CPU, "bf16", exact=False)
    assert not any(part.fused for part in plain.modules() if isinstance(part, ConvNorm))
    for one, other in zip(fused.features(IMAGES), plain.features(IMAGES), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


@pytest.fixture(scope="module")
def wide() -> Network:
    """Of torchvision's width from the pyramid on."""
    config = ModelConfig(body="resnet18", body_width=8, box_head_width=16, num_classes=2)
    torch.manual_seed(0)
    built = build_network(config, Recipe())
    assert isinstance(built.mask_head, MaskHead)
    nn.init.normal_(built.mask_head.mask_logits.weight)
    return built


def _by(kind: type, network: Network) -> dict[str, list[bool]]:
    """Which 3×3 convolutions run as `kind`."""
    parts = {"body": network.body, "pyramid": network.fpn, "RPN": network.rpn, "mask head": network.mask_head}
    return {
        name: [isinstance(part.winograd, kind) for part in parent.modules() if _is_3x3(part)]
        for name, parent in parts.items()
        if parent is not None
    }


IN_BODY = [False] * 8 + [False, True, True, True] * 2
"""Of the first stages the channels are too few, of the others the first convolution has a stride."""
NONE = {"body": [False] * 16, "pyramid": [False] * 4, "RPN": [False], "mask head": [False] * 4}


@pytest.mark.parametrize("kind", [pytest.param(CompiledWinograd, marks=needs_compiled), Winograd])
def test_wide_convolutions_go_by_winograd_in_float32(
    wide: Network, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """By the compiled form where there is one, which takes fewer channels."""
    if kind == Winograd:
        monkeypatch.setattr(compiled_winograd, "_library", lambda: None)
    running = ready_to_run(wide, CPU, "fp32", exact=False)
    expected = {**NONE, "pyramid": [True] * 4, "RPN": [True], "mask head": [True] * 4}
    assert _by(kind, running) == expected | ({"body": IN_BODY} if kind == CompiledWinograd else {})
    exact = ready_to_run(wide, CPU, "fp32", exact=True)
    assert _by(Winograd, exact) == _by(CompiledWinograd, exact) == NONE


@needs_compiled
@pytest.mark.parametrize(("precision", "kind"), [("fp32", Winograd), ("bf16", CompiledWinograd)])
def test_convolutions_of_the_box_head_go_by_what_is_faster_on_small_maps(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, kind: type
) -> None:
    monkeypatch.setattr(network, "has_bf16_tiles", lambda: False)
    config = ModelConfig(body="resnet18", body_width=8, box_head="4conv1fc", num_classes=2)
    running = ready_to_run(build_network(config, Recipe()), CPU, precision, exact=False)
    assert {type(part.winograd) for part in running.box_head.convs if isinstance(part, ConvNorm)} == {kind}


@needs_compiled
@pytest.mark.parametrize("has_tiles", [False, True])
def test_bfloat16_goes_by_integers_but_on_processors_with_tiles_of_it(
    wide: Network, monkeypatch: pytest.MonkeyPatch, has_tiles: bool
) -> None:
    monkeypatch.setattr(network, "has_bf16_tiles", lambda: has_tiles)
    running = ready_to_run(wide, CPU, "bf16", exact=False)
    every = {"body": IN_BODY, "pyramid": [True] * 4, "RPN": [True], "mask head": [True] * 4}
    assert _by(CompiledWinograd, running) == (NONE if has_tiles else every)
    assert _by(Winograd, running) == NONE


def test_without_the_compiled_form_only_the_rpn_goes_by_winograd_beside_bfloat16(
    wide: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "has_bf16_tiles", lambda: False)
    monkeypatch.setattr(compiled_winograd, "_library", lambda: None)
    running = ready_to_run(wide, CPU, "bf16", exact=False)
    assert _by(CompiledWinograd, running) == NONE
    assert _by(Winograd, running) == {**NONE, "RPN": [True]}


def _is_3x3(part: nn.Module) -> TypeGuard[ConvNorm]:
    return isinstance(part, ConvNorm) and part.conv.kernel_size == (3, 3)


@torch.inference_mode()
def test_levels_have_one_dtype_whatever_computed_them(wide: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "has_bf16_tiles", lambda: False)
    running = ready_to_run(wide, CPU, "bf16", exact=False)
    assert {level.dtype for level in running.features(IMAGES)} == {torch.bfloat16}


@pytest.mark.parametrize("has_onednn_bf16", [True, False])
@pytest.mark.parametrize("in_integers", [pytest.param(True, marks=needs_compiled), False])
@torch.inference_mode()
def test_a_mask_head_in_bfloat16_is_that_in_float32_within_its_rounding(
    wide: Network, monkeypatch: pytest.MonkeyPatch, has_onednn_bf16: bool, in_integers: bool
) -> None:
    monkeypatch.setattr(network, "has_bf16_tiles", lambda: False)
    if not has_onednn_bf16:
        monkeypatch.setattr(network, "can_fuse_on_cpu", lambda dtype: dtype == torch.float32)
    if not in_integers:
        monkeypatch.setattr(compiled_winograd, "_library", lambda: None)
    torch.manual_seed(0)
    regions, labels = torch.randn(6, 256, 14, 14).bfloat16(), torch.ones(6, dtype=torch.int64)
    mixed = ready_to_run(wide, CPU, "bf16", exact=False).mask_head
    full = ready_to_run(wide, CPU, "fp32", exact=True).mask_head
    assert isinstance(mixed, MaskHead)
    assert isinstance(full, MaskHead)
    weights = {value.dtype for name, value in mixed.convs.named_parameters() if name.endswith("weight")}
    assert weights == {torch.float32 if in_integers else torch.bfloat16}
    assert mixed.upsample.weight.dtype == torch.bfloat16
    found, expected = mixed(regions, labels), full(regions, labels)
    assert float(expected.std()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_a_network_trained_in_float64_runs_in_float32(small_net: MaskRCNN) -> None:
    running = ready_to_run(copy.deepcopy(small_net.network).double(), CPU, "fp32", exact=True)
    expected = ready_to_run(small_net.network, CPU, "fp32", exact=True).state_dict()
    found = running.state_dict()
    assert {value.dtype for value in running.parameters()} == {torch.float32}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("device", "precision", "exact", "message"),
    [
        ("cpu", "fp16", False, "fp32 or bf16"),
        ("cpu", "bf16", True, "exact needs precision fp32"),
        ("meta", "fp32", False, "cpu or cuda"),
    ],
)
def test_what_cannot_run_is_refused(
    small_net: MaskRCNN, device: str, precision: Precision, exact: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ready_to_run(small_net.network, torch.device(device), precision, exact=exact)


def test_a_missing_gpu_is_refused_with_the_way_out(small_net: MaskRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device; use device='cpu'"):
        ready_to_run(small_net.network, torch.device("cuda"), "bf16", exact=False)

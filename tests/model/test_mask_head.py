from __future__ import annotations

import math

import pytest
import torch

from model.conv_norm import ConvNorm
from model.mask_head import MaskClasses, MaskHead, MLPMaskHead, own_against_others


def _head(*, num_convs: int = 2, classes: MaskClasses = "sigmoid") -> MaskHead:
    torch.manual_seed(0)
    head = MaskHead(in_channels=6, channels=8, num_convs=num_convs, num_classes=4, classes=classes, norm=None)
    torch.nn.init.normal_(head.mask_logits.weight)
    torch.nn.init.normal_(head.mask_logits.bias)
    return head


@torch.inference_mode()
def test_own_class_is_one_of_all_classes() -> None:
    for num_convs in (0, 2):
        head = _head(num_convs=num_convs)
        x, labels = torch.randn(5, 6, 3, 3), torch.tensor([3, 1, 1, 2, 0])
        all_classes = torch.nn.functional.conv2d(
            head.upsample(head.convs(x)).relu(), head.mask_logits.weight, head.mask_logits.bias
        )  # (R, K, M, M)
        torch.testing.assert_close(head(x, labels), all_classes[torch.arange(5), labels], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_cell_becomes_four_in_place() -> None:
    head = MaskHead(in_channels=1, channels=1, num_convs=0, num_classes=2, norm=None)
    head.upsample.weight.copy_(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert head.upsample.bias is not None
    head.upsample.bias.zero_()
    head.mask_logits.weight.fill_(10.0)
    x = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    expected = [[10.0, 20.0, 0.0, 0.0], [30.0, 40.0, 0.0, 0.0], [0.0, 0.0, 20.0, 40.0], [0.0, 0.0, 60.0, 80.0]]
    assert head(x, torch.tensor([1]))[0].tolist() == expected


@torch.inference_mode()
def test_logits_are_float32_whatever_the_features() -> None:
    head = _head().to(torch.bfloat16)
    assert head(torch.randn(2, 6, 3, 3, dtype=torch.bfloat16), torch.tensor([1, 2])).dtype == torch.float32


@torch.inference_mode()
def test_no_regions_no_masks() -> None:
    assert _head()(torch.zeros(0, 6, 3, 3), torch.zeros(0, dtype=torch.int64)).shape == (0, 6, 6)


def test_convs_keep_the_side() -> None:
    for part in _head().convs:
        assert isinstance(part, ConvNorm)
        assert part.conv.padding == (1, 1)


LABELS = torch.tensor([3, 1, 1, 2, 0])


@torch.inference_mode()
def test_all_logits_are_those_of_each_class() -> None:
    head = _head()
    x = torch.randn(5, 6, 3, 3)
    every = head.all_logits(x)
    assert every.shape == (5, 4, 6, 6)
    for label in range(4):
        torch.testing.assert_close(every[:, label], head(x, torch.full((5,), label)), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_of_competing_classes_the_own_ones_share_is_given() -> None:
    head = _head(classes="softmax")
    x = torch.randn(5, 6, 3, 3)
    shares = head.all_logits(x).softmax(dim=1)[torch.arange(5), LABELS]
    torch.testing.assert_close(head(x, LABELS).sigmoid(), shares, rtol=1e-5, atol=1e-6)


def test_own_against_others_by_hand() -> None:
    # of e⁰, e⁰ and e² the last has the odds e² / 2
    logits = torch.tensor([0.0, 0.0, 2.0]).view(1, 3, 1, 1)
    assert own_against_others(logits, torch.tensor([2])).item() == pytest.approx(2 - math.log(2))


@torch.inference_mode()
def test_one_mask_for_all_takes_no_notice_of_labels() -> None:
    head = _head(classes="agnostic")
    x = torch.randn(5, 6, 3, 3)
    assert head.mask_logits.weight.shape[0] == 1
    assert torch.equal(head(x, LABELS), head(x, LABELS.flip(0)))


@torch.inference_mode()
def test_mlp_by_hand() -> None:
    head = MLPMaskHead(in_channels=1, resolution=1, num_classes=2)
    for name, value in head.named_parameters():
        value.fill_(1 / 1024 if name.endswith("weight") else 0.0)
    last = head.fcs[-1]
    assert isinstance(last, torch.nn.Linear)
    last.bias[4:] = 10.0
    # 4 becomes 4/1024 in each of 1,024 hidden values, whose mean that is again, and so once more
    logits = head(torch.full((2, 1, 1, 1), 4.0), torch.tensor([0, 1]))
    torch.testing.assert_close(logits[0], torch.full((2, 2), 4 / 1024))
    torch.testing.assert_close(logits[1], torch.full((2, 2), 4 / 1024 + 10))


@pytest.mark.parametrize("classes", ["sigmoid", "softmax", "agnostic"])
def test_no_regions_give_no_masks(classes: MaskClasses) -> None:
    none, labels = torch.zeros(0, 6, 3, 3), torch.zeros(0, dtype=torch.int64)
    mlp = MLPMaskHead(in_channels=6, resolution=3, num_classes=4, classes=classes)
    assert _head(classes=classes)(none, labels).shape == mlp(none, labels).shape == (0, 6, 6)

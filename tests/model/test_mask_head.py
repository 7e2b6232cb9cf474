from __future__ import annotations

import torch

from model.conv_norm import ConvNorm
from model.mask_head import MaskHead


def _head(*, num_convs: int = 2) -> MaskHead:
    torch.manual_seed(0)
    head = MaskHead(in_channels=6, channels=8, num_convs=num_convs, num_classes=4, norm=None)
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

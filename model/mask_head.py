"""Mask head (He et al. 2017): pooled features and labels enter, the logits of each region's own class leave."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from model.conv_norm import ConvNorm, Norm

# R regions, C channels, K classes with background, S pooled side, M = 2 S mask side.


class OwnClassLogits(nn.Module):
    """A 1×1 convolution to K classes of which only the wanted output is computed."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        weight = self.weight[labels].flatten(1)[..., None]  # (R, C, 1)
        logits = torch.bmm(x, weight.to(x.dtype)).squeeze(-1)  # (R, X) of x (R, X, C)
        return logits.float() + self.bias[labels, None].float()


class MaskHead(nn.Module):
    """3×3 convolutions, a 2×2 transposed convolution that doubles the side, and a logit for each cell."""

    def __init__(self, *, in_channels: int, channels: int, num_convs: int, num_classes: int, norm: Norm | None) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(
            *(ConvNorm(before, after, kernel_size=3, norm=norm) for before, after in pairwise(widths))
        )
        self.upsample = nn.ConvTranspose2d(widths[-1], channels, kernel_size=2, stride=2)
        self.mask_logits = OwnClassLogits(channels, num_classes)

    def forward(self, region_features: Tensor, labels: Tensor) -> Tensor:
        x = self.convs(region_features).permute(0, 2, 3, 1)  # (R, S, S, C)
        num_regions, side, _, _ = x.shape
        # Stride equals kernel, so no outputs overlap: each cell makes four by a linear layer, and the
        # logits are taken before the four are moved to their places.
        up = self.upsample
        weight = up.weight.permute(2, 3, 1, 0).reshape(4 * up.out_channels, up.in_channels)  # (2 2 C, C)
        assert up.bias is not None
        x = nn.functional.linear(x, weight, up.bias.repeat(4)).relu_()  # (R, S, S, 2 2 C)
        logits: Tensor = self.mask_logits(
            x.reshape(num_regions, side * side * 4, up.out_channels), labels
        )  # (R, S S 2 2)
        logits = logits.view(num_regions, side, side, 2, 2).transpose(2, 3)  # (R, S, 2, S, 2)
        return logits.reshape(num_regions, side * 2, side * 2)  # (R, M, M)

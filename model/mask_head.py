"""Mask head (He et al. 2017): pooled features and labels enter, the logits of each region's own class leave.

Convolutions or, for table 2e, linear layers. A class's mask is independent of the others (sigmoid), competes
with them (softmax, table 2b), or is one for all classes (agnostic).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from model.conv_norm import ConvNorm, to_layer
from model.fused_conv import fused_linear
from model.norm import Norm

# R regions, C channels, K outputs (classes with background, or one), S pooled side, M = 2 S mask side.

MaskClasses = Literal["sigmoid", "softmax", "agnostic"]

MLP_WIDTH = 1024
"""Of the two hidden layers of the MLP."""


class ClassLogits(nn.Module):
    """A 1×1 convolution to K classes, of which only the wanted output is computed where one is enough."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_outputs, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Of x (R, X, C): (R, X) for the outputs `labels` (R,), or (R, X, K) for all."""
        if labels is None:
            return nn.functional.linear(x, self.weight.flatten(1), self.bias).float()
        weight = self.weight[labels].flatten(1)[..., None]  # (R, C, 1)
        logits = torch.bmm(x, weight.to(x.dtype)).squeeze(-1)  # (R, X)
        return logits.float() + self.bias[labels, None].float()


class MaskHead(nn.Module):
    """3×3 convolutions, a 2×2 transposed convolution that doubles the side, and a logit for each cell."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        num_convs: int,
        num_classes: int,
        classes: MaskClasses = "sigmoid",
        norm: Norm | None,
    ) -> None:
        super().__init__()
        self.classes = classes
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(
            *(ConvNorm(before, after, kernel_size=3, norm=norm) for before, after in pairwise(widths))
        )
        self.upsample = nn.ConvTranspose2d(widths[-1], channels, kernel_size=2, stride=2)
        self.mask_logits = ClassLogits(channels, 1 if classes == "agnostic" else num_classes)
        self.fused = False
        """Whether what follows a product runs with it, as in a fused ConvNorm."""

    def forward(self, region_features: Tensor, labels: Tensor) -> Tensor:
        """(R, M, M) the logit of each cell's belonging to the region's own class."""
        if self.classes == "softmax":
            return own_against_others(self.all_logits(region_features), labels)
        if self.classes == "agnostic":
            labels = torch.zeros_like(labels)
        return self._cell_logits(region_features, labels)

    def all_logits(self, region_features: Tensor) -> Tensor:
        """(R, K, M, M) of every output."""
        return self._cell_logits(region_features, None).permute(0, 3, 1, 2)

    def _cell_logits(self, region_features: Tensor, labels: Tensor | None) -> Tensor:
        x = to_layer(self.convs(region_features), self.upsample).permute(0, 2, 3, 1)  # (R, S, S, C)
        num_regions, side, _, _ = x.shape
        # Stride equals kernel, so no outputs overlap: each cell makes four by a linear layer, and the
        # logits are taken before the four are moved to their places.
        up = self.upsample
        weight = up.weight.permute(2, 3, 1, 0).reshape(4 * up.out_channels, up.in_channels)  # (2 2 C, C)
        assert up.bias is not None
        bias = up.bias.repeat(4)
        x = x.flatten(0, 2)  # (R S S, C)
        x = fused_linear(x, weight, bias) if self.fused else nn.functional.linear(x, weight, bias).relu_()
        logits: Tensor = self.mask_logits(
            x.reshape(num_regions, side * side * 4, up.out_channels), labels
        )  # (R, S S 2 2) or (R, S S 2 2, K)
        outputs = logits.shape[2:]
        logits = logits.view(num_regions, side, side, 2, 2, *outputs).transpose(2, 3)  # (R, S, 2, S, 2, …)
        return logits.reshape(num_regions, side * 2, side * 2, *outputs)  # (R, M, M, …)


class MLPMaskHead(nn.Module):
    """Three linear layers over the pooled features."""

    def __init__(
        self, *, in_channels: int, resolution: int, num_classes: int, classes: MaskClasses = "sigmoid"
    ) -> None:
        super().__init__()
        self.classes = classes
        self.side = 2 * resolution
        num_outputs = (1 if classes == "agnostic" else num_classes) * self.side**2
        widths = [in_channels * resolution**2, MLP_WIDTH, MLP_WIDTH, num_outputs]
        self.fcs = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, region_features: Tensor, labels: Tensor) -> Tensor:
        """(R, M, M) the logit of each cell's belonging to the region's own class."""
        logits = self.all_logits(region_features)
        if self.classes == "softmax":
            return own_against_others(logits, labels)
        if self.classes == "agnostic":
            return logits[:, 0]
        return logits[torch.arange(len(logits), device=logits.device), labels]

    def all_logits(self, region_features: Tensor) -> Tensor:
        """(R, K, M, M) of every output."""
        x = region_features.flatten(1)
        for fc in self.fcs[:-1]:
            x = fc(x).relu_()
        return self.fcs[-1](x).float().unflatten(1, (-1, self.side, self.side))  # type: ignore[no-any-return]


def own_against_others(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, M, M) the logit whose sigmoid is the softmax over K of (R, K, M, M) at the label."""
    own = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])  # (R, 1, M, M)
    others = logits.scatter(1, own, -torch.inf).logsumexp(dim=1)  # (R, M, M)
    return logits.gather(1, own)[:, 0] - others

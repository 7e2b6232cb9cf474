"""Feature pyramid (Lin et al. 2017): C2 to C5 enter, P2 to P6 of one width leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.conv_norm import ConvNorm, adds_by_kernel
from model.nearest import add_nearest
from model.norm import Norm

# N images, C pyramid channels.


class FPN(nn.Module):
    """Lateral 1×1 convolutions, the top-down sum, and a 3×3 convolution for each level."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, norm: Norm | None) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            ConvNorm(channels, out_channels, kernel_size=1, norm=norm, relu=False) for channels in in_channels
        )
        self.output = nn.ModuleList(
            ConvNorm(out_channels, out_channels, kernel_size=3, norm=norm, relu=False) for _ in in_channels
        )
        self.fused = False
        """Whether a lateral convolution adds the coarser map itself, as a fused ConvNorm can."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        top_down = self.lateral[-1](features[-1])
        levels = [self.output[-1](top_down)]
        for index in range(len(features) - 2, -1, -1):
            if self.fused or adds_by_kernel(top_down):
                top_down = self.lateral[index](features[index], plus=top_down)
            else:
                top_down = add_nearest(self.lateral[index](features[index]), top_down)
            level = self.output[index](top_down)
            levels.insert(0, level.to(top_down.dtype))  # as of one, for those who pool them
        levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))  # P6 serves the RPN only
        return levels  # (N, C, H/4, W/4) to (N, C, H/64, W/64)

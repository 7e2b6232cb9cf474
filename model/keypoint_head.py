"""Keypoint head (He et al. 2017, section 5): pooled features enter, a heatmap of logits for each keypoint leaves."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from model.conv_norm import ConvNorm

# R regions, C channels, K keypoints, S pooled side.


class KeypointHead(nn.Module):
    """3×3 convolutions, a transposed convolution that doubles the side, and a bilinear doubling."""

    def __init__(self, *, in_channels: int, channels: int = 512, num_convs: int = 8, num_keypoints: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(*(ConvNorm(before, after, kernel_size=3) for before, after in pairwise(widths)))
        self.upsample = nn.ConvTranspose2d(widths[-1], num_keypoints, kernel_size=4, stride=2, padding=1)

    def forward(self, region_features: Tensor) -> Tensor:
        """(R, K, 4 S, 4 S) float32."""
        x = self.upsample(self.convs(region_features)).float()  # (R, K, 2 S, 2 S)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

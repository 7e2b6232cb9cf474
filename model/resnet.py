"""ResNet bodies (He et al. 2015): images enter, the feature maps C2 to C5 at strides 4 to 32 leave.

The stride of a bottleneck is in its 3×3 convolution, as in torchvision.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.conv_norm import ConvNorm, Norm

# N images, C channels, H × W the padded input.

STAGE_CHANNELS = (64, 128, 256, 512)
"""Width of the 3×3 convolutions in res2 to res5."""


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the shortcut around them."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, kernel_size=3, stride=stride, norm=norm)
        self.conv2 = ConvNorm(channels, channels, kernel_size=3, norm=norm, relu=False)
        self.shortcut = _shortcut(in_channels, channels, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(self.conv1(x)).add_(shortcut).relu_()  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and the shortcut around them."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = ConvNorm(in_channels, channels, kernel_size=1, norm=norm)
        self.conv2 = ConvNorm(channels, channels, kernel_size=3, stride=stride, norm=norm)
        self.conv3 = ConvNorm(channels, out_channels, kernel_size=1, norm=norm, relu=False)
        self.shortcut = _shortcut(in_channels, out_channels, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(x))).add_(shortcut).relu_()  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stem and four stages of blocks."""

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, int, int, int], *, norm: Norm) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STAGE_CHANNELS[0], kernel_size=7, stride=2, norm=norm)
        stages, in_channels = [], STAGE_CHANNELS[0]
        for channels, depth, stride in zip(STAGE_CHANNELS, depths, (1, 2, 2, 2), strict=True):
            blocks = [block(in_channels, channels, stride=stride, norm=norm)]
            in_channels = channels * block.expansion
            blocks += [block(in_channels, channels, stride=1, norm=norm) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.res2, self.res3, self.res4, self.res5 = stages
        self.out_channels = tuple(channels * block.expansion for channels in STAGE_CHANNELS)
        """Of C2 to C5."""

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.stem(images), kernel_size=3, stride=2, padding=1)  # (N, 64, H/4, W/4)
        features = []
        for stage in (self.res2, self.res3, self.res4, self.res5):
            x = stage(x)
            features.append(x)
        return features  # (N, C, H/4, W/4) to (N, 8 C, H/32, W/32)


def resnet18(*, norm: Norm) -> ResNet:
    """ResNet-18."""
    return ResNet(BasicBlock, (2, 2, 2, 2), norm=norm)


def resnet50(*, norm: Norm) -> ResNet:
    """ResNet-50."""
    return ResNet(Bottleneck, (3, 4, 6, 3), norm=norm)


def _shortcut(in_channels: int, out_channels: int, *, stride: int, norm: Norm) -> ConvNorm | None:
    """The projection of a block whose input and output differ in shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return ConvNorm(in_channels, out_channels, kernel_size=1, stride=stride, norm=norm, relu=False)

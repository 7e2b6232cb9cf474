"""ResNet (He et al. 2015) and ResNeXt (Xie et al. 2016): images enter, the maps C2 to C5 at strides 4 to 32 leave.

With a C4 neck res5 is no part of the body: it runs on every region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Body
from model.conv_norm import ConvNorm, adds_by_kernel
from model.fused_conv import fused_stem
from model.norm import Norm

# N images, C channels, H × W the padded input.

StrideIn = Literal["3x3", "1x1"]
"""The convolution of a bottleneck that has the stride."""


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the shortcut around them."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, kernel_size=3, stride=stride, norm=norm)
        self.conv2 = ConvNorm(channels, channels, kernel_size=3, norm=norm)
        self.shortcut = _shortcut(in_channels, channels, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(self.conv1(x), plus=shortcut)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and the shortcut around them; the 3×3 may be in groups."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        stride: int,
        groups: int,
        stride_in: StrideIn,
        norm: Norm,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1 = ConvNorm(in_channels, width, kernel_size=1, stride=first, norm=norm)
        self.conv2 = ConvNorm(width, width, kernel_size=3, stride=second, groups=groups, norm=norm)
        self.conv3 = ConvNorm(width, out_channels, kernel_size=1, norm=norm)
        self.shortcut = _shortcut(in_channels, out_channels, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(x)), plus=shortcut)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one ResNet differs from another in."""

    depths: tuple[int, int, int, int]
    """Blocks of res2 to res5."""
    bottleneck: bool = True
    """Bottlenecks, or the two 3×3 convolutions of ResNet-18."""
    groups: int = 1
    """Of the 3×3 convolution."""
    group_share: float = 1.0
    """Channels of a group, of those of the stage."""
    width: int = 64
    """Channels of the stem and of res2, doubled with each stage."""

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Width of the 3×3 convolutions in res2 to res5 where there is one group."""
        return tuple(self.width * 2**index for index in range(len(self.depths)))

    @property
    def inner_channels(self) -> tuple[int, ...]:
        """Width of those convolutions, all groups together."""
        return tuple(int(self.groups * self.group_share * channels) for channels in self.stage_channels)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Of C2 to C5."""
        return tuple(channels * (4 if self.bottleneck else 1) for channels in self.stage_channels)

    def stage(self, index: int, *, stride_in: StrideIn, norm: Norm) -> nn.Sequential:
        """The blocks of res2 (index 0) to res5 (3)."""
        blocks: list[nn.Module] = []
        in_channels = self.width if index == 0 else self.out_channels[index - 1]
        for number in range(self.depths[index]):
            stride = 2 if number == 0 and index > 0 else 1
            if self.bottleneck:
                block: nn.Module = Bottleneck(
                    in_channels,
                    self.out_channels[index],
                    width=self.inner_channels[index],
                    stride=stride,
                    groups=self.groups,
                    stride_in=stride_in,
                    norm=norm,
                )
            else:
                block = BasicBlock(in_channels, self.stage_channels[index], stride=stride, norm=norm)
            blocks.append(block)
            in_channels = self.out_channels[index]
        return nn.Sequential(*blocks)


ARCHITECTURES: dict[Body, Architecture] = {
    "resnet18": Architecture(depths=(2, 2, 2, 2), bottleneck=False),
    "resnet50": Architecture(depths=(3, 4, 6, 3)),
    "resnet101": Architecture(depths=(3, 4, 23, 3)),
    "resnext101_32x8d": Architecture(depths=(3, 4, 23, 3), groups=32, group_share=1 / 8),
}


class ResNet(nn.Module):
    """Stem and the first stages of blocks, as many as asked for."""

    def __init__(self, architecture: Architecture, *, num_stages: int = 4, stride_in: StrideIn, norm: Norm) -> None:
        super().__init__()
        self.stem = ConvNorm(3, architecture.width, kernel_size=7, stride=2, norm=norm)
        self.stage_names = [f"res{index + 2}" for index in range(num_stages)]
        for index, name in enumerate(self.stage_names):
            self.add_module(name, architecture.stage(index, stride_in=stride_in, norm=norm))
        self.out_channels = architecture.out_channels[:num_stages]
        """Of C2 and on."""
        self.fused = False
        """Whether what follows a product runs with it, as in a fused ConvNorm."""

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.fused and images.shape[2] % 2 == images.shape[3] % 2 == 0:
            x = fused_stem(self.stem.conv, images)  # (N, 64, H/4, W/4)
        else:
            x = _max_pool(self.stem(images))  # (N, 64, H/4, W/4)
        features = []  # may be overwritten by a block whose shortcut they are, which no stage begins with
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            features.append(x)
        return features  # (N, C, H/4, W/4) to (N, 8 C, H/32, W/32)


def _max_pool(x: Tensor) -> Tensor:
    if adds_by_kernel(x):
        from model.kernels.pool_in_training import max_pool_in_training

        return max_pool_in_training(x)
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def _shortcut(in_channels: int, out_channels: int, *, stride: int, norm: Norm) -> ConvNorm | None:
    """The projection of a block whose input and output differ in shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return ConvNorm(in_channels, out_channels, kernel_size=1, stride=stride, norm=norm, relu=False)

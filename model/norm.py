"""Norms of a convolution's outputs: batch norm frozen or not (Ioffe & Szegedy 2015), group norm (Wu & He 2018)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
"""Makes the norm of so many channels."""

NUM_GROUPS = 32
"""Of a group norm, as in the paper."""


class FrozenNorm(nn.Module):
    """Batch norm of which nothing is ever trained: a product and a sum, two roundings, as torchvision's."""

    def __init__(self, num_channels: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_channels,), value))
        self._kept: tuple[list[tuple[Tensor, int]], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return x.mul_(scale[:, None, None]).add_(shift[:, None, None])

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,) each."""
        weight, bias, mean, variance = statistics(self)
        scale = weight * (variance + self.eps).rsqrt()
        return scale, bias - mean * scale

    def kept_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The same, computed anew only where a buffer is another or was written to, but through `.data`."""
        buffers = list(self.buffers())
        if self._kept is None or any(
            now is not before or now._version != version
            for now, (before, version) in zip(buffers, self._kept[0], strict=True)
        ):
            with torch.inference_mode(mode=False):
                self._kept = [(buffer, buffer._version) for buffer in buffers], self.scale_and_shift()
        return self._kept[1]


def norm_of(kind: Literal["frozen", "batch", "sync", "group"], eps: float) -> Norm:
    """The norm a config asks for."""
    if kind == "group":
        return partial(nn.GroupNorm, NUM_GROUPS, eps=eps)
    return partial({"frozen": FrozenNorm, "batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm}[kind], eps=eps)


def statistics(norm: nn.Module) -> list[Tensor]:
    """Weight, bias, mean and variance of a norm that is not a group norm."""
    return [getattr(norm, name).detach() for name in ("weight", "bias", "running_mean", "running_var")]


def running_statistics(network: nn.Module) -> list[Tensor]:
    """What batch norms learn while they run, which no optimiser changes; torch's counts of batches nothing uses."""
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]

"""Copies between host and device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host there, in the order of what the device is given; a plain copy to it waits for all before."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """A copy, of a device's in page-locked memory, which holds the values once the device has come so far."""
    if values.device.type != "cuda":
        return values.clone()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


class HostCopy:
    """A copy of `values` as they are at that point of what the device is given, and not of the host's time: who waits
    for it does not wait for what comes behind."""

    def __init__(self, values: Tensor) -> None:
        self._values = to_host(values.detach())
        self._done: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._done = torch.cuda.current_stream(values.device).record_event()

    def wait(self) -> Tensor:
        """The values, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._values

"""Copies between host and device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host there, in the order of what the device is given; a plain copy to it waits for all before."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of `values` that is begun at once: who waits for it does not wait for what the device is given after."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().to("cpu", non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._done = torch.cuda.current_stream(values.device).record_event()

    def wait(self) -> Tensor:
        """The values, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._values

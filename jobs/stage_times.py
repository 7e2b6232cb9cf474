"""Where the time of one system goes: its stages are told to a clock as they end, by a network itself or by hooks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from model.stages import STAGES, AfterStage, Stage


class Telling(Protocol):
    """A context in which a system tells its stages."""

    def __call__(self, after: AfterStage) -> AbstractContextManager[None]: ...


class StageClock:
    """Seconds of each stage, summed; a device has done its work when a stage ends."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._last = 0.0

    def start(self) -> None:
        """What comes next belongs to the first stage."""
        self._wait()
        self._last = time.perf_counter()

    def after(self, stage: Stage) -> None:
        """What came since the stage before, or the start, was this one's."""
        self._wait()
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def hooked(
    after: AfterStage, *, ends: Mapping[nn.Module, Stage], begins: Mapping[nn.Module, Stage] | None = None
) -> Iterator[None]:
    """Each module of `ends` ends its stage, and the stage named in `begins` ends where the module begins."""
    handles = [
        module.register_forward_hook(lambda _module, _in, _out, stage=stage: after(stage))
        for module, stage in ends.items()
    ]
    handles += [
        module.register_forward_pre_hook(lambda _module, _in, stage=stage: after(stage))
        for module, stage in (begins or {}).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""What a benchmark measures: seconds of systems that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

System = TypeVar("System")
"""What names a system."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured."""

    part: str
    system: str
    images: int
    seconds: tuple[float, ...]
    """Of each repeat."""

    @property
    def images_per_second(self) -> float:
        return self.images / statistics.median(self.seconds)


def take_turns(
    systems: dict[System, Callable[[Path], float]], outputs: Iterator[Path], repeats: int
) -> dict[System, tuple[float, ...]]:
    """Each system in turn, so that a slow minute of the machine meets them all."""
    seconds: dict[System, list[float]] = {system: [] for system in systems}
    for _ in range(repeats):
        for system, measure in systems.items():
            seconds[system].append(measure(next(outputs)))
    return {system: tuple(times) for system, times in seconds.items()}

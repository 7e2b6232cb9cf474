"""How a run went over time, in bins that grow wider with it: as many for a minute as for a month."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_BINS = 240


@dataclass(kw_only=True)
class Timeline:
    """Images, and the seconds that stages took, in equal bins from the first shard handed out."""

    bin_seconds: float = 1.0
    images: list[float] = field(default_factory=list)
    """A shard's are spread evenly over the time it took."""
    stage_seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, stop: float, *, seconds: float, images: int, stages: Mapping[str, float]) -> None:
        """A shard that was done at `stop`, and had been under way for so many `seconds`."""
        while stop >= MAX_BINS * self.bin_seconds:
            self._widen()
        start = max(0.0, stop - seconds)
        first, last = int(start // self.bin_seconds), int(stop // self.bin_seconds)
        for index in range(first, last + 1):
            begin, end = max(start, index * self.bin_seconds), min(stop, (index + 1) * self.bin_seconds)
            share = (end - begin) / (stop - start) if stop > start else 1.0
            _add_at(self.images, index, share * images)
            for stage, stage_seconds in stages.items():
                _add_at(self.stage_seconds.setdefault(stage, []), index, share * stage_seconds)

    def _widen(self) -> None:
        self.bin_seconds *= 2
        self.images = _in_pairs(self.images)
        self.stage_seconds = {stage: _in_pairs(values) for stage, values in self.stage_seconds.items()}


def _add_at(values: list[float], index: int, value: float) -> None:
    values.extend([0.0] * (index + 1 - len(values)))
    values[index] += value


def _in_pairs(values: list[float]) -> list[float]:
    return [sum(values[index : index + 2]) for index in range(0, len(values), 2)]

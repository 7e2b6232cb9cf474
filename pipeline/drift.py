"""Whether a run found other things than the one before it, in numbers and in words.

Histograms of both runs enter. Each pair is compared by the population stability index, PSI = Σ (q − p) ln(q / p) over
its bins, which bankers take for a change worth looking at from 0.1 and for a large one from 0.25. Between samples of n
and m images of the same source it is not zero but about (bins − 1)(1/n + 1/m), as chi-squared is; what chance explains
is not called drift. Instances of one image are not independent, so n and m are images, also for scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NOTABLE_PSI = 0.1
LARGE_PSI = 0.25
DEVIATIONS = 4.0
"""Of chance, above its mean: one in some ten thousand comparisons."""
MIN_IMAGES = 30
"""Of either run; with fewer nothing can be said."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """What one run has of something, and how it is put into words."""

    counts: Mapping[str, int]
    """By bin."""
    typical: str
    """Its middle or its mean, for people."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One pair of histograms compared."""

    name: str
    psi: float
    chance: float
    """The most that chance explains."""
    before: str
    after: str

    @property
    def size(self) -> Literal["none", "some", "large"]:
        if self.psi <= max(NOTABLE_PSI, self.chance):
            return "none"
        return "large" if self.psi > LARGE_PSI else "some"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A run beside the one before it."""

    previous_run: str
    changes: tuple[Change, ...]
    too_few: bool = False

    @property
    def is_drift(self) -> bool:
        return any(change.size != "none" for change in self.changes)

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if self.too_few:
            return f"Too few images to tell: both runs need {MIN_IMAGES}."
        changed = sorted((one for one in self.changes if one.size != "none"), key=lambda one: -one.psi)
        if not changed:
            return "No drift: this run is like the one before."
        words = [f"{one.name} {'changed much' if one.size == 'large' else 'changed'} ({one.before} → {one.after})"
                 for one in changed]  # fmt: skip
        return f"Drift: {'; '.join(words)}."


def compare(
    before: Mapping[str, Histogram], after: Mapping[str, Histogram], *, images: tuple[int, int], previous_run: str
) -> Drift:
    """Histograms of the same names, of so many images before and after."""
    if min(images) < MIN_IMAGES:
        return Drift(previous_run=previous_run, changes=(), too_few=True)
    changes = []
    for name, histogram in after.items():
        psi, bins = stability_index(before[name].counts, histogram.counts)
        chance = _most_by_chance(bins, images)
        changes.append(Change(name=name, psi=psi, chance=chance, before=before[name].typical, after=histogram.typical))
    return Drift(previous_run=previous_run, changes=tuple(changes))


def stability_index(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[float, int]:
    """PSI and the number of bins it is over. Half a count is added to each bin, so that an empty one is no infinity."""
    bins = sorted(set(before) | set(after))
    totals = [sum(counts.values()) + 0.5 * len(bins) for counts in (before, after)]
    psi = 0.0
    for name in bins:
        p, q = ((counts.get(name, 0) + 0.5) / total for counts, total in zip((before, after), totals, strict=True))
        psi += (q - p) * math.log(q / p)
    return psi, len(bins)


def _most_by_chance(bins: int, images: tuple[int, int]) -> float:
    freedom, scale = max(0, bins - 1), 1 / images[0] + 1 / images[1]
    return (freedom + DEVIATIONS * math.sqrt(2 * freedom)) * scale

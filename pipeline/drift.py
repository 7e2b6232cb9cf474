"""Whether a run found other things than the one before it, in numbers and in words.

Histograms of both runs enter. Each pair is compared by the population stability index, PSI = Σ (q − p) ln(q / p) over
its bins, which bankers take for a change worth looking at from 0.1 and for a large one from 0.25. Between samples of n
and m images of the same source it is not zero; how large it gets is seen by drawing many such pairs, and what chance
explains is not called drift. Instances of one image are not independent, so n and m are images, also for scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

NOTABLE_PSI = 0.1
LARGE_PSI = 0.25
DRAWS = 10_000
"""Pairs of samples that chance is judged by."""
BY_CHANCE = 0.9998
"""Share of them that is not called drift: of five comparisons a night one is wrong in a thousand nights."""
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
        psi = stability_index(before[name].counts, histogram.counts)
        chance = most_by_chance(before[name].counts, histogram.counts, images)
        changes.append(Change(name=name, psi=psi, chance=chance, before=before[name].typical, after=histogram.typical))
    return Drift(previous_run=previous_run, changes=tuple(changes))


def stability_index(before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """PSI."""
    return float(_stability_index(*_aligned(before, after)))


def most_by_chance(before: Mapping[str, int], after: Mapping[str, int], images: tuple[int, int]) -> float:
    """The PSI that so many images of one source, that of both runs together, hardly ever have."""
    together = _aligned(before, after).sum(0)
    if not together.sum():
        return 0.0
    chance = np.random.default_rng(0)
    drawn = [chance.multinomial(number, together / together.sum(), DRAWS) for number in images]
    return float(np.quantile(_stability_index(*drawn), BY_CHANCE))


def _aligned(before: Mapping[str, int], after: Mapping[str, int]) -> NDArray[np.int64]:
    """(2, B): both over the bins of either."""
    bins = sorted({*before, *after})
    return np.array([[counts.get(name, 0) for name in bins] for counts in (before, after)], np.int64)


def _stability_index(before: NDArray[np.int64], after: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of counts (…, B). Half a count is added to each bin, so that an empty one is no infinity."""
    p, q = ((counts + 0.5) / (counts + 0.5).sum(-1, keepdims=True) for counts in (before, after))
    return np.asarray(((q - p) * np.log(q / p)).sum(-1))

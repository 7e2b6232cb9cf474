"""Sampling, one image and one draw at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence


def sample(labels: Sequence[int], *, count: int, positive_fraction: float, draw: random.Random) -> list[int]:
    """Positions chosen: positives up to their share, then negatives until there are `count` or no more."""
    chosen: list[int] = []
    for label, limit in ((1, int(count * positive_fraction)), (0, count)):
        left = [position for position, each in enumerate(labels) if each == label]
        while left and len(chosen) < limit:
            chosen.append(left.pop(draw.randrange(len(left))))
    return sorted(chosen)

"""The losses of training, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def smooth_l1(difference: float, beta: float) -> float:
    size = abs(difference)
    return size * size / 2 / beta if size < beta else size - beta / 2


def binary_cross_entropy(logit: float, target: float) -> float:
    score = 1 / (1 + math.exp(-logit))
    return -target * math.log(score) - (1 - target) * math.log(1 - score)


def cross_entropy(logits: Sequence[float], label: int) -> float:
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[label]

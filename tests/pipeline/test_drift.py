from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.drift import MIN_IMAGES, Drift, Histogram, compare, most_by_chance, stability_index


def histogram(values: NDArray[np.int64]) -> Histogram:
    return Histogram(counts=Counter(map(str, values.tolist())), typical=f"{values.mean():.2f}")


def drift(before: NDArray[np.int64], after: NDArray[np.int64]) -> Drift:
    one, other = histogram(before), histogram(after)
    images = (sum(one.counts.values()), sum(other.counts.values()))
    return compare({"n": one}, {"n": other}, images=images, previous_run="r1")


def test_the_index_is_the_formula() -> None:
    psi = stability_index({"a": 9, "b": 1}, {"a": 4, "b": 6})
    p, q = [9.5 / 11, 1.5 / 11], [4.5 / 11, 6.5 / 11]
    assert psi == pytest.approx(sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True)))
    assert stability_index({"a": 5}, {"a": 50}) == 0
    assert stability_index({}, {}) == 0
    assert most_by_chance({}, {}, (30, 30)) == 0


def test_chance_explains_what_few_images_in_rare_bins_do() -> None:
    """36 images of one source each: the theory of many images in every bin would put the bound at 0.55."""
    before, after = {"9–16": 34, "17–32": 2}, {"9–16": 24, "17–32": 7, "5–8": 5}
    assert 0.55 < stability_index(before, after) < most_by_chance(before, after, (36, 36)) < 1.2
    many = most_by_chance({"a": 500, "b": 500}, {"a": 500, "b": 500}, (1000, 1000))
    assert many == pytest.approx(3.72**2 * 2 / 1000, rel=0.15), "chi-squared of one degree, at 0.9998"


def test_samples_of_one_source_are_hardly_ever_called_drift() -> None:
    chance = np.random.default_rng(0)
    called = [
        drift(chance.poisson(4, int(n)), chance.poisson(4, int(m))).is_drift
        for n, m in chance.integers(MIN_IMAGES, 400, (200, 2))
    ]
    assert sum(called) <= 1


def test_nor_are_samples_with_rare_values() -> None:
    chance = np.random.default_rng(1)
    called = [drift(chance.geometric(0.4, 36), chance.geometric(0.4, 40)).is_drift for _ in range(150)]
    assert sum(called) <= 1


def test_a_change_of_the_source_is_called_so() -> None:
    chance = np.random.default_rng(0)
    found = drift(chance.poisson(4, 200), chance.poisson(1.5, 200))
    assert found.is_drift
    assert found.changes[0].size == "large"
    assert found.verdict.startswith("Drift: n changed much (")
    assert "→" in found.verdict
    assert not drift(chance.poisson(4, 2000), chance.poisson(4.1, 2000)).is_drift


def test_with_few_images_nothing_is_said() -> None:
    found = drift(np.full(29, 1), np.full(1000, 5))
    assert not found.is_drift
    assert "Too few" in found.verdict

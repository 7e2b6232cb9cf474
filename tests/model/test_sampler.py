"""Sampling against a loop, against torchvision's sampler, and by hand."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from model.boxes import Places
from model.sampler import Sampler, random_sampler
from tests.reference import sampler as reference


def labels_of(*rows: tuple[int, int, int], seed: int = 0) -> Tensor:
    """(N, B) shuffled labels of images that have so many positives, negatives and neither."""
    shuffle = torch.Generator().manual_seed(seed)
    images = [torch.tensor([1] * positives + [0] * negatives + [-1] * rest) for positives, negatives, rest in rows]
    return torch.stack([image[torch.randperm(len(image), generator=shuffle)] for image in images]).to(torch.int8)


def seeded(count: int, positive_fraction: float, seed: int = 0) -> Sampler:
    generator = torch.Generator().manual_seed(seed)
    return random_sampler(count=count, positive_fraction=positive_fraction, generator=generator)


def marks(label: Tensor, places: Places) -> Tensor:
    """(N, B) bool whether each is chosen, none of them twice."""
    times = torch.zeros(label.shape, dtype=torch.int64).scatter_add_(1, places.position, places.filled.to(torch.int64))
    assert not (times > 1).any()
    assert not places.position[~places.filled].any()
    return times > 0


def numbers(label: Tensor, places: Places) -> list[tuple[int, int]]:
    """Positives and negatives chosen of each image."""
    chosen = marks(label, places)
    assert not (chosen & (label < 0)).any()
    return [
        (int((chosen & (label == 1))[image].sum()), int((chosen & (label == 0))[image].sum()))
        for image in range(len(label))
    ]


def test_numbers_by_hand() -> None:
    # 8 of each: at most 2 positives (a quarter); what they lack, negatives fill; what those lack, nothing.
    label = labels_of((5, 15, 0), (1, 15, 4), (5, 3, 12), (0, 20, 0), (20, 0, 0), (0, 0, 20))
    chosen = seeded(8, 0.25)(label)
    assert chosen.position.shape == (6, 8)
    assert numbers(label, chosen) == [(2, 6), (1, 7), (2, 3), (0, 8), (2, 0), (0, 0)]


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, (0, 5)), (0.5, (2, 3)), (1.0, (5, 0))])
def test_the_share_of_positives_is_rounded_down(fraction: float, expected: tuple[int, int]) -> None:
    label = labels_of((10, 10, 0))
    assert numbers(label, seeded(5, fraction)(label)) == [expected]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=12, max_size=12), min_size=1, max_size=4),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.25, 0.5, 0.99, 1.0]),
)
def test_numbers_are_torchvisions_and_the_loops(rows: list[list[int]], count: int, fraction: float) -> None:
    label = torch.tensor(rows, dtype=torch.int8)
    found = numbers(label, seeded(count, fraction)(label))
    theirs = BalancedPositiveNegativeSampler(count, fraction)(list(label))
    assert found == [(int(positive.sum()), int(negative.sum())) for positive, negative in zip(*theirs, strict=True)]
    for row, pair in zip(rows, found, strict=True):
        chosen = reference.sample(row, count=count, positive_fraction=fraction, draw=random.Random(0))
        assert pair == (sum(row[position] == 1 for position in chosen), sum(row[position] == 0 for position in chosen))


def test_every_candidate_is_as_likely() -> None:
    # 4,000 draws of 2 of 6 positives and 6 of 10 negatives: a share of 1/3 and of 3/5 has a deviation of 0.0075 and
    # 0.0077, and none of 16 strays by five of them.
    label = labels_of((6, 10, 2)).expand(4_000, -1)
    share = marks(label, seeded(8, 0.25)(label)).double().mean(dim=0)
    torch.testing.assert_close(share[label[0] == 1], torch.full((6,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.039)
    torch.testing.assert_close(share[label[0] == 0], torch.full((10,), 0.6, dtype=torch.float64), rtol=0, atol=0.039)
    chosen = marks(label, seeded(8, 0.25)(label))[:, label[0] == 1]
    together = (chosen[:, 0] & chosen[:, 1]).double().mean()  # each of 15 pairs
    assert abs(float(together) - 1 / 15) < 5 * (1 / 15 * 14 / 15 / 4_000) ** 0.5


def test_a_generator_decides() -> None:
    label = labels_of((50, 200, 30), (3, 100, 177))
    first, again, other = (marks(label, seeded(16, 0.5, seed)(label)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    sampler = seeded(16, 0.5, 1)
    assert torch.equal(marks(label, sampler(label)), first)
    assert not torch.equal(marks(label, sampler(label)), first)  # the next batch draws anew


def test_without_a_generator_torchs_own_decides() -> None:
    label = labels_of((50, 200, 30))
    sampler = random_sampler(count=16, positive_fraction=0.5)
    torch.manual_seed(3)
    first = sampler(label)
    torch.manual_seed(3)
    assert torch.equal(sampler(label).position, first.position)


def test_nothing_to_sample() -> None:
    assert seeded(8, 0.5)(torch.zeros(2, 0, dtype=torch.int8)).position.shape == (2, 0)
    assert seeded(8, 0.5)(torch.zeros(0, 9, dtype=torch.int8)).position.shape == (0, 8)


def test_bounds() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        random_sampler(count=0, positive_fraction=0.5)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        random_sampler(count=1, positive_fraction=1.5)


def test_seeds_make_the_choice_independent_of_the_batch() -> None:
    label = labels_of((50, 200, 10), (60, 150, 50))
    sampler = random_sampler(count=32, positive_fraction=0.5)
    together = sampler(label, [3, 4])
    chosen = marks(label, together)
    assert torch.equal(chosen, marks(label, sampler(label, [3, 4])))
    assert torch.equal(chosen[1:], marks(label[1:], sampler(label[1:], [4])))
    assert not torch.equal(chosen, marks(label, sampler(label, [4, 3])))
    more = torch.cat([label, torch.full((2, 7), -1, dtype=torch.int8)], dim=1)  # places another worker padded
    assert torch.equal(marks(more, sampler(more, [3, 4]))[:, :260], chosen)
    assert numbers(label, together) == [(16, 16), (16, 16)]

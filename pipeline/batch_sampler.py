"""The order in which images are trained on: their sizes enter, an endless stream of batches leaves.

The stream follows from the seed, the sizes and the batch size alone, not from the number of workers, and can be begun
at any batch. Landscape and portrait images fill separate batches, which pads less (detectron2
AspectRatioGroupedDataset).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

# N images, B batch size, M images of one group, L of them left waiting, F full batches of an epoch.

Item = TypeVar("Item")
Ints = NDArray[np.int64]


class Sample(NamedTuple):
    """One image in one epoch."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks for
    """Its row among the sizes."""


def batches(sizes: Ints, *, batch_size: int, seed: int, start: int = 0) -> Iterator[list[Sample]]:
    """Batches without end from number `start` on; `sizes` (N, 2) are the images' heights and widths.

    Each epoch visits every image once, in a random order of its own. A batch leaves when its group has `batch_size`
    images; what is left of a group waits for the next epoch's.
    """
    if sizes.ndim != 2 or sizes.shape[1] != 2 or len(sizes) == 0:
        raise ConfigError(f"sizes must be (N, 2) heights and widths of at least 1 image, got {sizes.shape}")
    _check_at_least("batch_size", batch_size, 1)
    _check_at_least("seed", seed, 0)
    _check_at_least("start", start, 0)
    is_landscape = sizes[:, 1] >= sizes[:, 0]  # (N,)
    groups = [group for group in (is_landscape, ~is_landscape) if group.any()]
    return _batches(groups, batch_size, seed, start)


def share(batch: Sequence[Item], rank: int, num_workers: int) -> list[Item]:
    """What worker `rank` of `num_workers` does of a batch, or of a list beside it: in order, and as much as any other
    worker or one more or less."""
    _check_at_least("num_workers", num_workers, 1)
    if not 0 <= rank < num_workers:
        raise ConfigError(f"rank must be from 0 to {num_workers - 1}, got {rank}")
    if len(batch) < num_workers:
        raise ConfigError(
            f"a batch of {len(batch)} leaves some of {num_workers} workers without an image; "
            "raise the batch size or take fewer workers"
        )
    return list(batch[rank * len(batch) // num_workers : (rank + 1) * len(batch) // num_workers])


def steps_in_epochs(num_images: int, epochs: float, batch_size: int) -> int:
    """How many batches hold as many images as `epochs` epochs do, rounded up."""
    _check_at_least("num_images", num_images, 1)
    _check_at_least("batch_size", batch_size, 1)
    if not 0 <= epochs < math.inf:
        raise ConfigError(f"epochs must be at least 0 and finite, got {epochs}")
    return math.ceil(Fraction(str(epochs)) * num_images / batch_size)  # 1.1 is eleven tenths, not a little more


def _batches(groups: Sequence[NDArray[np.bool_]], batch_size: int, seed: int, start: int) -> Iterator[list[Sample]]:
    """The stream; `groups` (N,) each say which images belong to one."""
    epoch, num_left_out = _find_epoch([int(group.sum()) for group in groups], batch_size, start)
    waiting = [_waiting(group, batch_size, seed, epoch) for group in groups]  # (L, 2) each
    while True:
        order = _order(seed, epoch, len(groups[0]))  # (N,)
        full, filled_at = [], []
        for number, group in enumerate(groups):
            places = np.flatnonzero(group[order])  # (M,)
            samples = np.concatenate([waiting[number], _samples(epoch, order[places])])  # (L + M, 2)
            num_full = len(samples) // batch_size
            last = np.arange(1, num_full + 1) * batch_size - 1 - len(waiting[number])  # of each batch, among the M
            filled_at.append(places[last])
            full.append(samples[: num_full * batch_size].reshape(num_full, batch_size, 2))
            waiting[number] = samples[num_full * batch_size :]
        in_order = np.concatenate(full)[np.argsort(np.concatenate(filled_at))]  # (F, B, 2)
        for batch in in_order[num_left_out:]:
            yield [Sample(*sample) for sample in batch.tolist()]
        epoch, num_left_out = epoch + 1, 0


def _find_epoch(counts: Sequence[int], batch_size: int, start: int) -> tuple[int, int]:
    """The epoch in which batch `start` fills up, and how many do so before it in that epoch.

    How many fill up in an epoch follows from the sizes of the groups, whatever the order of their images.
    """

    def num_batches(epochs: int) -> int:
        return sum(epochs * count // batch_size for count in counts)

    epoch = start * batch_size // sum(counts)  # not too late, as rounding down leaves no more than `start`
    while num_batches(epoch + 1) <= start:
        epoch += 1
    return epoch, start - num_batches(epoch)


def _waiting(group: NDArray[np.bool_], batch_size: int, seed: int, epoch: int) -> Ints:
    """(L, 2) the samples of a group left over when an epoch begins, some of them from several epochs before it."""
    count = int(group.sum())
    num_waiting = epoch * count % batch_size
    first = epoch - -(-num_waiting // count)
    orders = [(past, _order(seed, past, len(group))) for past in range(first, epoch)]
    samples = [_samples(past, order[group[order]]) for past, order in orders]  # (M, 2) each
    together = np.concatenate([np.zeros((0, 2), np.int64), *samples])
    return together[len(together) - num_waiting :]


def _order(seed: int, epoch: int, num_images: int) -> Ints:
    return np.random.default_rng([seed, epoch]).permutation(num_images)


def _samples(epoch: int, indices: Ints) -> Ints:
    """(M, 2) epoch and index."""
    return np.stack([np.full_like(indices, epoch), indices], axis=1)


def _check_at_least(name: str, value: int, bound: int) -> None:
    if value < bound:
        raise ConfigError(f"{name} must be at least {bound}, got {value}")

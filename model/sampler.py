"""Which anchors or proposals are trained on: few of the many, in a fixed ratio (Fast R-CNN section 2.3)."""

# N images, B anchors or proposals of an image, P positives and at most S samples of an image.

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.boxes import Places, first_marked

_NEVER = 2.0
"""Above every key."""


class Sampler(Protocol):
    """Chooses from what may be trained on."""

    def __call__(self, label: Tensor, seeds: Sequence[int] | None = None) -> Places:
        """(N, S) the chosen places of `label` (N, B) int8, of which 1 is positive, 0 negative, -1 never chosen.

        `seeds`, one for each image, make its choice independent of the batch it is in.
        """
        ...


def random_sampler(*, count: int, positive_fraction: float, generator: torch.Generator | None = None) -> Sampler:
    """Up to `count` of each image, at most `positive_fraction` of them positive and the rest negative, all subsets as
    likely. Without seeds they are drawn by `generator`, on the labels' device, or else by torch's own."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= positive_fraction <= 1:
        raise ValueError(f"positive_fraction must be between 0 and 1, got {positive_fraction}")
    max_positives = int(count * positive_fraction)  # rounded down as in torchvision

    def sample(label: Tensor, seeds: Sequence[int] | None = None) -> Places:
        keys = _seeded(label, seeds) if seeds else torch.rand(label.shape, generator=generator, device=label.device)
        limit = torch.full((len(label), 1), max_positives, device=label.device)  # (N, 1)
        positives = _least(keys, label > 0, limit, max_places=max_positives)
        num_positives = positives.filled.sum(dim=1, keepdim=True)  # (N, 1)
        negatives = _least(keys, label == 0, count - num_positives, max_places=count)
        position, filled = (torch.cat(both, dim=1) for both in zip(positives, negatives, strict=True))
        chosen = first_marked(filled, limit=min(count, label.shape[1]))
        return Places(position.gather(1, chosen.position).where(chosen.filled, 0), chosen.filled)

    return sample


def _seeded(label: Tensor, seeds: Sequence[int]) -> Tensor:
    """(N, B) in 0..1, each row from its seed."""
    generator = torch.Generator(label.device)
    rows = [torch.rand(label.shape[1], generator=generator.manual_seed(seed), device=label.device) for seed in seeds]
    return torch.stack(rows)


def _least(keys: Tensor, among: Tensor, limit: Tensor, *, max_places: int) -> Places:
    """The `limit` (N, 1) smallest keys of each row `among` those marked, or all of them if they are fewer."""
    num_places = min(max_places, keys.shape[1])
    least, position = keys.masked_fill(~among, _NEVER).topk(num_places, dim=1, largest=False)  # (N, S)
    return Places(position, (least < _NEVER) & (torch.arange(num_places, device=keys.device) < limit))

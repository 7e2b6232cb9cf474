"""Which anchors or proposals are trained on: few of the many, in a fixed ratio (Fast R-CNN section 2.3)."""

# N images, B anchors or proposals of an image, P positives and at most S samples of an image.

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Sampler(Protocol):
    """Chooses from what may be trained on."""

    def __call__(self, label: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """(N, B) bool whether each is chosen; of `label` (N, B) int8 1 is positive, 0 negative, -1 never chosen.

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

    def sample(label: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        keys = _seeded(label, seeds) if seeds else torch.rand(label.shape, generator=generator, device=label.device)
        limit = torch.full((len(label), 1), max_positives, device=label.device)  # (N, 1)
        positives = _least(keys, label > 0, limit, max_places=max_positives)
        return positives | _least(keys, label == 0, count - positives.sum(dim=1, keepdim=True), max_places=count)

    return sample


def _seeded(label: Tensor, seeds: Sequence[int]) -> Tensor:
    """(N, B) in 0..1, each row from its seed."""
    generator = torch.Generator(label.device)
    rows = [torch.rand(label.shape[1], generator=generator.manual_seed(seed), device=label.device) for seed in seeds]
    return torch.stack(rows)


def _least(keys: Tensor, among: Tensor, limit: Tensor, *, max_places: int) -> Tensor:
    """(N, B) the `limit` (N, 1) smallest keys of each row `among` those marked, or all of them if they are fewer."""
    num_places = min(max_places, keys.shape[1])
    order = keys.masked_fill(~among, 2.0).topk(num_places, dim=1, largest=False).indices  # (N, S), keys are below 1
    within = torch.arange(num_places, device=keys.device) < limit  # (N, S)
    return torch.zeros_like(among).scatter_(1, order, within) & among

"""COCO's compressed strings of run lengths on CUDA: 5 bits a character, least first, each run from the fourth on as
the difference from the run two before (cocoapi common/maskApi.c rleToString).

In: the borders of all masks end to end, a border being where a run ends, counted from the mask's first pixel. Out: the
strings of all masks end to end, in a buffer of a given capacity. Nothing waits for the host.
"""

# S strings, R runs of one mask read side by side.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RUNS = 128
"""R: what a mask of middling size has."""

MAX_CHARACTERS = tl.constexpr(8)
"""Of one run: a sign and 39 bits, so images of up to 2 ** 39 pixels."""


def write_strings(borders: Tensor, run_counts: Tensor, run_ends: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The text (capacity,) uint8 of S strings, and where each ends (S,): beyond the capacity it is not written.

    Args:
        borders: (B,) int64 of all masks, end to end.
        run_counts: (S,) int64: how many are of each mask.
        run_ends: (S,) int64: where each mask's borders end. A mask whose borders are not all there has an empty string.
        capacity: bytes for which there is room.
    """
    text = torch.empty(capacity, dtype=torch.uint8, device=borders.device)
    lengths = torch.empty_like(run_counts)

    def spell(ends: Tensor, *, write: bool) -> None:
        _spell[(len(run_counts),)](
            borders, run_counts, run_ends, len(borders), lengths, ends, text, capacity, write=write, runs=RUNS
        )

    spell(lengths, write=False)
    ends = torch.cumsum(lengths, 0)  # (S,)
    spell(ends, write=True)
    return text, ends


@triton.jit  # type: ignore[untyped-decorator]
def _spell(
    borders: tl.tensor,
    run_counts: tl.tensor,
    run_ends: tl.tensor,
    num_borders: tl.tensor,
    lengths: tl.tensor,
    ends: tl.tensor,
    text: tl.tensor,
    capacity: tl.tensor,
    write: tl.constexpr,
    runs: tl.constexpr,
) -> None:
    """Count the characters of one string, or write them, up to ``ends``."""
    string = tl.program_id(0)
    run_end, run_count = tl.load(run_ends + string), tl.load(run_counts + string)
    first = borders + run_end - run_count
    run_count = tl.where(run_end <= num_borders, run_count, 0).to(tl.int32)
    total = tl.zeros_like(run_end)
    if write:
        total = tl.load(ends + string) - tl.load(lengths + string)
    for block in range(0, run_count, runs):
        run = block + tl.arange(0, runs)
        exists = run < run_count
        here, one = _border(first, run, exists), _border(first, run - 1, exists)
        two, three = _border(first, run - 2, exists), _border(first, run - 3, exists)
        value = here - one - tl.where(run > 2, two - three, 0)
        # The top bit of the last character is the sign.
        magnitude = tl.where(value < 0, ~value, value) >> 4
        length = exists.to(tl.int32)
        for index in tl.static_range(MAX_CHARACTERS - 1):
            length += (exists & ((magnitude >> (5 * index)) > 0)).to(tl.int32)
        if write:
            place = total + tl.cumsum(length, 0) - length
            for index in tl.static_range(MAX_CHARACTERS):
                character = ((value >> (5 * index)) & 31) + tl.where(length > index + 1, 32, 0) + 48
                tl.store(
                    text + place + index, character.to(tl.uint8), mask=(index < length) & (place + index < capacity)
                )
        total += tl.sum(length, 0)
    if not write:
        tl.store(lengths + string, total)


@triton.jit  # type: ignore[untyped-decorator]
def _border(first: tl.tensor, run: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """Where a run ends: at 0 where there is none."""
    return tl.load(first + run, mask=exists & (run >= 0), other=0)

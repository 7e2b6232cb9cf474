from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.rounding import to_bfloat16


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), side=st.sampled_from([1, 3, 7]))
def test_the_sum_of_a_kernel_is_off_by_one_rounding(seed: int, side: int) -> None:
    weight = torch.randn(4, 5, side, side, generator=torch.Generator().manual_seed(seed))
    rounded = to_bfloat16(weight)
    off = (rounded.double() - weight.double()).sum(dim=(2, 3)).abs()
    largest = weight.abs().amax(dim=(2, 3)).double() * (1 + 2**-6)  # a cell may be raised by what was left over
    assert (off <= largest * 2.0**-8).all()
    # and no cell is farther off than its own rounding and what the one before left over
    assert ((rounded.double() - weight.double()).abs() <= largest[..., None, None] * 2.0**-7).all()


def test_rounding_by_hand() -> None:
    """Between 1 and 2 bfloat16 has steps of 1/128: of four cells a quarter of a step above 1, one takes the step."""
    weight = torch.full((1, 1, 2, 2), 1 + 1 / 512)
    assert to_bfloat16(weight).flatten().tolist() == [1.0, 1.0, 1 + 1 / 128, 1.0]
    assert weight.bfloat16().flatten().tolist() == [1.0] * 4

from __future__ import annotations

import pytest
import torch

from model.host_copy import HostCopy


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_values_are_those_of_when_it_was_begun_and_nothing_behind_them_is_waited_for(where: str) -> None:
    values = torch.arange(6.0, device=where, requires_grad=True)
    copied = HostCopy(values * 2)
    done = None
    if where == "cuda":
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # cycles, about a second
        done = torch.cuda.current_stream().record_event()
    found = copied.wait()
    assert found.tolist() == [0, 2, 4, 6, 8, 10]
    assert found.device.type == "cpu"
    assert done is None or not done.query()

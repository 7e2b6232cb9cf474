from __future__ import annotations

import pytest
import torch

from model.transfers import HostCopy, to_device


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_values_are_those_of_when_it_was_begun_and_nothing_behind_them_is_waited_for(where: str) -> None:
    values = torch.arange(6.0, device=where)
    copied = HostCopy(values)
    values *= 0
    done = None
    if where == "cuda":
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # cycles, about a second
        done = torch.cuda.current_stream().record_event()
    found = copied.wait()
    assert found.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.device.type == "cpu"
    assert done is None or not done.query()


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_sent_is_what_was_there_and_the_host_goes_on(where: str) -> None:
    values = torch.arange(6.0)
    to_device(values, torch.device(where))  # page-locked memory is made at the first time
    if where == "cuda":
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # cycles, about a second
    sent = to_device(values, torch.device(where))
    waiting = where == "cuda" and not torch.cuda.current_stream().query()
    assert waiting == (where == "cuda")
    assert sent.device.type == where
    assert sent.tolist() == [0, 1, 2, 3, 4, 5]

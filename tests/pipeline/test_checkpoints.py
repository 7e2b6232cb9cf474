from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import checkpoints, storage
from pipeline.storage import join

ROOT = Path(__file__).parents[2]


def state_of(seed: int) -> dict[str, Any]:
    """Of a network that AdamW has trained for two steps, with bytes beside it."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        network(torch.randn(4, 3)).square().sum().backward()
        optimiser.step()
    return {
        "digest": "3f",
        "network": network.state_dict(),
        "averaged": None,
        "optimiser": optimiser.state_dict(),
        "history": b'{"kind": "step"}\n\x00\xff',
        "odd": [torch.tensor([float("nan"), -0.0]), (1, 2.5, "ü"), torch.ones(2, dtype=torch.bfloat16)],
    }


def assert_same(found: Any, expected: Any) -> None:
    """Kinds, order and every bit."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bytes(found.contiguous().untyped_storage()) == bytes(expected.contiguous().untyped_storage())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(found) is type(expected)
        assert found == expected


def names(output: str) -> list[str]:
    return sorted(file.uri.rpartition("/")[2] for file in storage.list_files(join(output, "checkpoints")))


def steps(output: str) -> list[int]:
    return [int(name[len("step=") :].partition("-")[0]) for name in names(output)]


def newest_step_of_state(output: str) -> int | None:
    state = checkpoints.newest(output)
    return None if state is None else int(state["step"])


def test_what_is_written_is_read_bit_for_bit(store: str) -> None:
    state = state_of(0)
    uri = checkpoints.write(store, 7, state, keep=2)
    assert storage.exists(uri)
    found = checkpoints.newest(store)
    assert found is not None
    assert found.pop("step") == 7
    assert_same(found, state)


def test_the_optimiser_goes_on_from_its_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def one_step(network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        network(torch.ones(2, 3)).square().sum().backward()
        optimiser.step()

    torch.manual_seed(0)
    network = nn.Linear(3, 5)
    optimiser = torch.optim.AdamW(network.parameters())
    one_step(network, optimiser)
    state = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
    checkpoints.write(str(tmp_path), 1, state, keep=1)
    one_step(network, optimiser)
    found = checkpoints.newest(str(tmp_path))
    assert found is not None
    again = nn.Linear(3, 5)
    again.load_state_dict(found["network"])
    resumed = torch.optim.AdamW(again.parameters())
    resumed.load_state_dict(found["optimiser"])
    one_step(again, resumed)
    assert_same(again.state_dict(), network.state_dict())


def test_the_highest_step_is_the_newest_whatever_was_written_last(store: str) -> None:
    for step in (9, 100, 20):
        checkpoints.write(store, step, {"value": step}, keep=5)
    assert checkpoints.newest_step(store) == newest_step_of_state(store) == 100


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        checkpoints.write(str(tmp_path), step, {}, keep=2)
    assert checkpoints.newest_step(str(tmp_path)) == newest_step_of_state(str(tmp_path)) == 100_000_000


def test_there_is_none_where_none_was_written(store: str) -> None:
    for output in (store, join(store, "no/such/folder")):
        assert checkpoints.newest(output) is None
        assert checkpoints.newest_step(output) is None
    storage.write_bytes(join(store, "metrics.jsonl"), b"{}")
    assert checkpoints.newest(store) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "altered", "foreign"])
def test_what_is_not_whole_is_passed_over_with_a_warning(
    store: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.write(store, 4, state_of(0), keep=3)
    uri = checkpoints.write(store, 8, state_of(1), keep=3)
    data = bytearray(storage.read_bytes(uri))
    if damage == "altered":
        data[len(data) // 2] ^= 1
    damaged = {"cut": bytes(data[:-100]), "empty": b"", "altered": bytes(data), "foreign": b"%PDF-1.7"}[damage]
    storage.write_bytes(uri, damaged)
    with caplog.at_level(logging.WARNING):
        assert newest_step_of_state(store) == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step 8" in caplog.text
    assert uri.rpartition("/")[2] in caplog.text


def test_files_of_other_names_and_folders_are_no_checkpoints(store: str) -> None:
    uri = checkpoints.write(store, 4, {"value": 4}, keep=1)
    data = storage.read_bytes(uri)
    name = uri.rpartition("/")[2].replace("step=00000004", "step=00000009")
    others = [f"backup/{name}", f"old-{name}", f"{name}.part", "notes.txt"]
    for other in others:
        storage.write_bytes(join(store, "checkpoints", other), data)
    assert checkpoints.newest_step(store) == newest_step_of_state(store) == 4
    checkpoints.write(store, 10, {"value": 10}, keep=1)
    assert all(storage.exists(join(store, "checkpoints", other)) for other in others)  # nor are they deleted as such


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(store: str, keep: int) -> None:
    for count, step in enumerate((2, 4, 6, 8, 10), 1):
        checkpoints.write(store, step, {"value": step}, keep=keep)
        assert steps(store) == [2, 4, 6, 8, 10][max(0, count - keep) : count]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_later_one_that_is_not_whole_takes_nobodys_place(tmp_path: Path, keep: int) -> None:
    """A run that went on from step 4, as 8 is broken, writes 6 and 8."""
    output = str(tmp_path)
    checkpoints.write(output, 4, {"value": 4}, keep=keep)
    broken = join(output, "checkpoints", f"step={8:08d}-{'f' * 32}.pt")  # sorts after any digest
    storage.write_bytes(broken, b"half of it")
    checkpoints.write(output, 6, {"value": 6}, keep=keep)
    assert newest_step_of_state(output) == 6
    assert steps(output) == [4, 6, 8][3 - keep - 1 :]
    checkpoints.write(output, 8, {"value": 8}, keep=keep)
    assert not storage.exists(broken)
    assert newest_step_of_state(output) == 8
    assert steps(output) == [6, 8][2 - keep :]


def test_a_step_written_again_is_there_once(store: str) -> None:
    for value in (0, 1, 1):
        checkpoints.write(store, 4, {"value": value}, keep=2)
        assert steps(store) == [4]
    found = checkpoints.newest(store)
    assert found == {"value": 1, "step": 4}


def test_one_that_is_deleted_between_listing_and_reading_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(str(tmp_path), 4, {}, keep=2)
    gone = checkpoints.write(str(tmp_path), 8, {}, keep=2)
    read = storage.read_bytes

    def read_late(uri: str) -> bytes:
        storage.delete(gone)
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", read_late)
    assert newest_step_of_state(str(tmp_path)) == 4


_KILLED_WRITER = """
import os, signal, sys
import torch
from pipeline import checkpoints

before = sys.argv[2] == "before the file is synced"
killed = "fsync" if before else "replace"
setattr(os, killed, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
checkpoints.write(sys.argv[1], 8, {"value": torch.ones(100_000)}, keep=1)
"""


@pytest.mark.parametrize("moment", ["before the file is synced", "before it has its name"])
def test_a_writer_killed_in_mid_write_leaves_the_older_one(tmp_path: Path, moment: str) -> None:
    output = str(tmp_path)
    checkpoints.write(output, 4, {"value": torch.zeros(3)}, keep=1)
    writer = subprocess.run([sys.executable, "-c", _KILLED_WRITER, output, moment], cwd=ROOT, check=False)
    assert writer.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path / "checkpoints")) == 2  # it had begun to write
    assert checkpoints.newest_step(output) == newest_step_of_state(output) == 4
    checkpoints.write(output, 8, {"value": torch.ones(3)}, keep=1)
    assert steps(output) == [8]
    assert newest_step_of_state(output) == 8

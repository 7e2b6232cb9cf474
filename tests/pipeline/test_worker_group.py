from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.worker_group import WorkerGroup

ROOT = Path(__file__).parents[2]

_WORKER = """
import json, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from pipeline.worker_group import WorkerGroup

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
group = WorkerGroup()
values = torch.tensor([1.0, 10.0]) * (rank + 1)
mean = group.mean(values)
report = {
    "rank": [group.rank, group.size],
    "counts": [group.mean_count(torch.tensor(count[rank])).item() for count in ((3, 4), (0, 1), (0, 0), (0, 6))],
    "mean": mean.tolist(),
    "given": values.tolist(),
    "gathered": [group.gather([(rank, number) for number in range(count[rank])]) for count in ((2, 3), (0, 1), (0, 0))],
}
learnt = torch.tensor(2.0 + rank, requires_grad=True)
report["has_gradient"] = group.mean(learnt * 3).requires_grad
if rank == 1:
    time.sleep(0.5)
    (folder / "late").touch()
group.wait()
report["waited"] = (folder / "late").exists()
(folder / f"{rank}.json").write_text(json.dumps(report))
group.wait()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("group")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([sys.executable, "-c", _WORKER, str(folder), str(rank)], cwd=ROOT, env=environment)
        for rank in range(2)
    ]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_and_size(reports: list[dict[str, Any]]) -> None:
    assert [report["rank"] for report in reports] == [[0, 2], [1, 2]]


def test_mean_count_is_of_all_workers_and_never_nothing(reports: list[dict[str, Any]]) -> None:
    """Its sum over the workers is what all have, at least 1, so that means of the quotients are whole quotients."""
    for report in reports:
        assert report["counts"] == [(3 + 4) / 2, 1 / 2, 1 / 2, 6 / 2]


def test_mean_is_of_all_workers_and_leaves_what_it_was_given(reports: list[dict[str, Any]]) -> None:
    for rank, report in enumerate(reports):
        assert report["mean"] == [(1 + 2) / 2, (10 + 20) / 2]
        assert report["given"] == [1.0 * (rank + 1), 10.0 * (rank + 1)]
        assert report["has_gradient"] is False


def test_gathered_items_are_the_first_workers_in_the_order_of_ranks(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["gathered"] == [[[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]], [[1, 0]], []]
    assert reports[1]["gathered"] == [[], [], []]


def test_waiting_is_for_all(reports: list[dict[str, Any]]) -> None:
    assert [report["waited"] for report in reports] == [True, True]


def test_a_process_without_a_group_is_one_of_one() -> None:
    group = WorkerGroup()
    assert (group.rank, group.size) == (0, 1)
    assert [group.mean_count(torch.tensor(count)).item() for count in (0, 1, 5)] == [1, 1, 5]
    assert group.mean(torch.tensor([2.0, 3.0])).tolist() == [2, 3]
    assert group.gather(["a", "b"]) == ["a", "b"]
    assert group.gather([]) == []
    group.wait()

"""Eight writers at one name: one wins, on every store, also when the line to it loses answers."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import commits, storage
from pipeline.storage import join
from tests.conftest import FaultyStore
from tests.pipeline.racer import create, share
from tests.pipeline.test_commits import make_commit

NUM_WRITERS = 8
NUM_RACES = [20, pytest.param(1_000, marks=pytest.mark.slow)]
FAULTS = ["lost", "lost", "lost", "reset", "409", "503"]
"""A quarter of the requests meet one of these."""


@pytest.mark.parametrize("num_races", NUM_RACES)
def test_create_exclusive_has_one_winner_in_every_race(store: str, num_races: int) -> None:
    def enter(race: int, me: int) -> bool:
        return storage.create_exclusive(join(store, f"{race}"), b"by %d" % me)

    for race, winners in enumerate(winners_of(num_races, enter)):
        assert len(winners) == 1, f"race {race}"
        assert storage.read_bytes(join(store, f"{race}")) == b"by %d" % winners[0]


@pytest.mark.slow
def test_of_eight_processes_one_wins_every_race_on_a_local_disk(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(NUM_WRITERS)
    with context.Pool(NUM_WRITERS, initializer=share, initargs=(barrier,)) as pool:
        wins = pool.map(create, [(str(tmp_path), 1_000, me) for me in range(NUM_WRITERS)], chunksize=1)
    assert sorted(race for won in wins for race in won) == list(range(1_000))
    for me, won in enumerate(wins):
        assert all(storage.read_bytes(join(str(tmp_path), f"{race}")) == b"by %d" % me for race in won)


@pytest.mark.parametrize("num_races", NUM_RACES)
def test_one_commit_wins_every_race_over_a_line_that_loses_answers(
    faulty_store: FaultyStore, num_races: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, proxy = faulty_store
    shortly = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 20))
    monkeypatch.setattr(commits, "time", shortly)
    chance = random.Random(num_races)
    faults = [chance.choice(FAULTS) if chance.random() < 0.25 else "" for _ in range(100 * num_races)]
    proxy.faults = list(faults)

    def enter(race: int, me: int) -> bool:
        return commits.publish(root, make_commit(f"a{me}", f"s{race}"), exclusive=True) == "won"

    winners = winners_of(num_races, enter)
    spent = faults[: len(faults) - len(proxy.faults)]
    proxy.faults = []
    assert spent.count("lost") >= num_races
    assert [len(won) for won in winners] == [1] * num_races
    found = {commit.shard_id: commit.attempt_id for commit in commits.read_commits(root)}
    assert found == {f"s{race}": f"a{won[0]}" for race, won in enumerate(winners)}


def winners_of(num_races: int, enter: Callable[[int, int], bool]) -> list[list[int]]:
    """Who won each race that eight threads began at once."""
    winners: list[list[int]] = [[] for _ in range(num_races)]
    barrier = threading.Barrier(NUM_WRITERS)

    def run(me: int) -> None:
        try:
            for race in range(num_races):
                barrier.wait()
                if enter(race, me):
                    winners[race].append(me)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        for done in [pool.submit(run, me) for me in range(NUM_WRITERS)]:
            done.result()
    return winners

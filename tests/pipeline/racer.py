"""One process of those that race for names, in a file that is quick to import."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier

from pipeline import storage

_barrier: Barrier


def share(barrier: Barrier) -> None:
    """Take what all the processes wait at before each race."""
    global _barrier  # noqa: PLW0603  a pool hands its parts to its processes so
    _barrier = barrier


def create(task: tuple[str, int, int]) -> list[int]:
    """The races, of so many below a root, that this process won."""
    root, num_races, me = task
    won = []
    for race in range(num_races):
        _barrier.wait()
        if storage.create_exclusive(storage.join(root, f"{race}"), b"by %d" % me):
            won.append(race)
    return won

"""Faults one after another against one command repeated, each table compared with the undisturbed one.

``python -m tests.chaos.run 200`` is ``make chaos``.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from tests.chaos.faults import Fault, faults_for
from tests.chaos.world import World, differences, wait_for

PROGRESS_SECONDS = 120.0
"""A run that commits nothing for so long, though no fault is under way, stands still."""
MAX_STARTS = 5
"""Of drivers for the last table, once there are no more faults."""

Driver = subprocess.Popen[bytes]


@dataclass(kw_only=True)
class Outcome:
    """What came of all faults."""

    faults: Counter[str] = field(default_factory=Counter)
    """By name."""
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    """By fault, how the driver was found after it."""
    tables: int = 0
    wrong: list[str] = field(default_factory=list)
    """Tables, finished or not, that were not as the undisturbed one."""
    hung: list[str] = field(default_factory=list)
    """What drivers said that had to end themselves."""


@dataclass(kw_only=True)
class Chaos:
    """So many faults in one world."""

    world: World
    expected: dict[str, pa.Table]
    """The undisturbed table."""
    num_faults: int
    chance: random.Random
    say: Callable[[str], None]
    outcome: Outcome = field(default_factory=Outcome)

    def run(self) -> Outcome:
        """Tables are made until there were all faults; the last is finished without any."""
        while self._faults_left:
            self.outcome.tables += 1
            self._make(self.world.table(self.outcome.tables))
        return self.outcome

    @property
    def _faults_left(self) -> int:
        return self.num_faults - self.outcome.faults.total()

    def _make(self, output: str) -> None:
        """One table to its end, by as many drivers as it takes."""
        world, deck, quiet_starts = self.world, list[Fault](), 0
        while True:
            if not world.drivers:
                world.start_driver(output)
                quiet_starts += not self._faults_left
                assert quiet_starts < MAX_STARTS, f"it does not end:\n{world.tail(output)}"
            driver = world.drivers[0]
            commits = self._wait_for_progress(driver, output)
            if driver.poll() is None and self._faults_left:
                deck = deck or self.chance.sample(faults_for(world, output), k=len(faults_for(world, output)))
                self._befall(deck.pop(), driver, output, commits)
            statuses = [world.end_of(one) for one in list(world.drivers) if one.poll() is not None]
            if 0 in statuses:
                for other in list(world.drivers):
                    world.end_of(other)
                self._compare(output, whole=True)
                _, hung, said = self.world.log(output).read_text(errors="replace").partition("Timeout (")
                self.outcome.hung += [said[:8000]] if hung else []
                self.say(f"{output} finished: {world.num_commits(output)} shards")
                return

    def _wait_for_progress(self, driver: Driver, output: str) -> int:
        """Until there is another commit and some time more; how many there were."""
        commits = self.world.num_commits(output)
        moved = wait_for(
            lambda: driver.poll() is not None or self.world.num_commits(output) > commits, PROGRESS_SECONDS
        )
        assert moved, f"it stands still:\n{self.world.tail(output)}"
        wait_for(lambda: driver.poll() is not None, self.chance.uniform(0, 3))
        return commits

    def _befall(self, fault: Fault, driver: Driver, output: str, commits: int) -> None:
        name, outcome = fault.__name__, self.outcome
        done = fault(self.world, output, self.chance)
        if not done:
            return  # it found nothing to harm, and does not count
        wait_for(lambda: driver.poll() is not None, 1.0)
        found = "went on" if driver.poll() is None else f"ended with {driver.poll()}"
        outcome.faults[name] += 1
        outcome.statuses.setdefault(name, Counter())[found] += 1
        clock = time.strftime("%H:%M:%S")
        self.say(f"{outcome.faults.total():3} {clock} {output} at {commits} commits: {done}; the driver {found}")
        self._compare(output, whole=False)

    def _compare(self, output: str, *, whole: bool) -> None:
        wrong = differences(self.world.rows(output), self.expected, whole=whole)
        if wrong:
            self.outcome.wrong.append(f"{output}: {wrong}")
            self.say(f"WRONG {self.outcome.wrong[-1]}")


def run_chaos(
    folder: Path, *, num_faults: int, num_images: int, seed: int, say: Callable[[str], None] = print
) -> Outcome:
    """An undisturbed table, then the faults."""
    with World(folder, num_images) as world:
        undisturbed = world.table(0)
        status = world.end_of(world.start_driver(undisturbed))
        assert status == 0, world.tail(undisturbed)
        expected = world.rows(undisturbed)
        assert expected["images"].num_rows == num_images
        say(f"undisturbed: {num_images} images, {expected['instances'].num_rows} instances")
        chance = random.Random(seed)
        return Chaos(world=world, expected=expected, num_faults=num_faults, chance=chance, say=say).run()


def main(num_faults: int, num_images: int = 5_000, seed: int = 0) -> int:
    """The faults, a table of them, and as the exit status whether anything was lost, doubled or changed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended then too
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="maskline-chaos-") as folder:
        outcome = run_chaos(Path(folder), num_faults=num_faults, num_images=num_images, seed=seed, say=_say)
    _say("\n| fault | times | the driver afterwards |\n|---|---|---|")
    for name, count in sorted(outcome.faults.items()):
        statuses = ", ".join(f"{status} {times}" for status, times in sorted(outcome.statuses[name].items()))
        _say(f"| {name} | {count} | {statuses} |")
    minutes = (time.monotonic() - began) / 60
    _say(f"\n{outcome.faults.total()} faults, {outcome.tables} tables of {num_images} images, {minutes:.0f} minutes")
    for log in outcome.hung:
        _say(f"\na driver hung after it was asked to stop:\n{log}")
    _say(f"not as the undisturbed table: {outcome.wrong or 'none'}")
    return 1 if outcome.wrong else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if os.environ.get("RAY_AUTH_MODE") != "token":  # Ray looks at it once, when it is imported
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.execve(sys.executable, [sys.executable, "-m", "tests.chaos.run", *sys.argv[1:]], environment)
    sys.exit(main(*map(int, sys.argv[1:])))

"""The faults: each does its harm, mends what a person would mend, and says what it did."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from tests.chaos.world import STALL_SECONDS, World, wait_for

Fault = Callable[[World, str, random.Random], str]
"""Given the world, the table under way and a source of chance; answers with what was done, nothing if nothing was."""

STALL_LOG = "stands still"


def kill_driver(world: World, output: str, chance: random.Random) -> str:
    driver = chance.choice(world.drivers)
    driver.kill()
    return f"driver {driver.pid} killed"


def stop_driver(world: World, output: str, chance: random.Random) -> str:
    driver = chance.choice(world.drivers)
    driver.terminate()
    return f"SIGTERM to driver {driver.pid}"


def kill_actor(world: World, output: str, chance: random.Random) -> str:
    return _kill(world, "actor", chance)


def kill_raylet(world: World, output: str, chance: random.Random) -> str:
    done = _kill(world, "raylet", chance)
    if not done:
        return ""
    world.add_node()
    return f"{done}, another node added"


def kill_gcs(world: World, output: str, chance: random.Random) -> str:
    """The cluster is gone with it; a person starts another one."""
    done = _kill(world, "gcs", chance)
    if not done:
        return ""
    for driver in list(world.drivers):
        world.end_of(driver)
    world.stop_cluster()
    world.start_cluster()
    return f"{done}, drivers ended, another cluster started"


def freeze_actor(world: World, output: str, chance: random.Random) -> str:
    """Until its shards are issued again; then it wakes and goes on with what others may have done."""
    actors = world.processes("actor")
    if not actors:
        return ""
    pid, before = chance.choice(actors), world.log(output).read_text(errors="replace").count(STALL_LOG)
    try:
        os.kill(pid, signal.SIGSTOP)
        issued = wait_for(
            lambda: world.log(output).read_text(errors="replace").count(STALL_LOG) > before, 3 * STALL_SECONDS
        )
    except ProcessLookupError:
        return ""
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return f"actor {pid} frozen, {'its shards issued again' if issued else 'nothing issued'}, woken"


def fill_disk(world: World, output: str, chance: random.Random) -> str:
    filler = world.disk / "filler"
    written = 0
    with suppress(OSError), filler.open("wb", buffering=0) as file:  # a buffer would be written once more at the close
        while True:
            written += file.write(bytes(1 << 16))
    time.sleep(chance.uniform(1, 4))
    filler.unlink()
    return f"disk filled with {written / 1e6:.0f} MB, emptied"


def cut_store(world: World, output: str, chance: random.Random) -> str:
    seconds = chance.uniform(1, 12)
    world.proxy.is_cut = True
    time.sleep(seconds)
    world.proxy.is_cut = False
    return f"store cut off for {seconds:.1f} s"


def lose_answers(world: World, output: str, chance: random.Random) -> str:
    faults = chance.choices(["lost", "reset", "500", "503", "409", ""], k=40)
    world.proxy.faults.extend(faults)
    wait_for(lambda: not world.proxy.faults, 10.0)
    world.proxy.faults.clear()
    return f"{sum(map(bool, faults))} of 40 answers lost or wrong"


def start_second(world: World, output: str, chance: random.Random) -> str:
    if len(world.drivers) > 1:
        return ""
    return f"the same job again, driver {world.start_driver(output).pid}"


def _kill(world: World, kind: str, chance: random.Random) -> str:
    found = world.processes(kind)
    if not found:
        return ""
    pid = chance.choice(found)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"{kind} {pid} killed"


ANYWHERE: tuple[Fault, ...] = (
    kill_driver,
    stop_driver,
    kill_actor,
    kill_actor,
    kill_raylet,
    kill_gcs,
    freeze_actor,
    start_second,
)
ON_DISK: tuple[Fault, ...] = (fill_disk,)
IN_STORE: tuple[Fault, ...] = (cut_store, lose_answers)


def faults_for(world: World, output: str) -> tuple[Fault, ...]:
    """Those that a table in this place can meet."""
    if output.startswith("s3:"):
        return ANYWHERE + IN_STORE
    return ANYWHERE + (ON_DISK if world.has_own_disk else ())

"""Every target stands its seeds; the slow test searches on from them for a minute each."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

SECONDS = 60


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_read(name: str) -> None:
    seeds = list(TARGETS[name].seeds())
    assert seeds
    for seed in seeds:
        TARGETS[name].read(seed)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="needs atheris: pip install 'maskline[fuzz]'")
@pytest.mark.parametrize("name", TARGETS)
def test_a_minute_of_search_finds_nothing(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", name, str(SECONDS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10 * SECONDS)
    assert run.returncode == 0, run.stderr[-5000:]
    executed = re.search(r"number_of_executed_units: (\d+)", run.stderr)
    assert executed is not None
    assert int(executed[1]) > 100
    print(f"{name}: {executed[1]} inputs")  # noqa: T201

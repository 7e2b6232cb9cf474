"""How large it may get: ten million images planned, a hundred thousand commits read again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.large_tables import IMAGES_PER_COMMIT, write_table

GIBIBYTE = 2**30


def plan(*arguments: object) -> dict[str, Any]:
    """In a new process."""
    command = [sys.executable, "-m", "tests.pipeline.large_tables", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    sys.stdout.write(f"\n{found}\n")
    return found


def test_a_plan_over_commits_leaves_what_is_new(tmp_path: Path) -> None:
    write_table(tmp_path / "table", 50)
    found = plan(51 * IMAGES_PER_COMMIT, tmp_path / "table")
    assert (found["commits"], found["done"], found["cut"]) == (50, 50 * IMAGES_PER_COMMIT, IMAGES_PER_COMMIT)


@pytest.mark.slow
def test_ten_million_images_are_planned_in_bounded_memory() -> None:
    found = plan(10_000_000)
    assert (found["listed"], found["cut"]) == (10_000_000, 10_000_000)
    assert found["peak_bytes"] < 2 * GIBIBYTE


@pytest.mark.slow
def test_a_hundred_thousand_commits_are_planned_over(tmp_path: Path) -> None:
    write_table(tmp_path / "table", 100_000)
    found = plan(100_001 * IMAGES_PER_COMMIT, tmp_path / "table")
    assert (found["commits"], found["cut"]) == (100_000, IMAGES_PER_COMMIT)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "gigabytes"), [("jpeg", 4), ("progressive", 4.5), ("png", 6), ("float-tiff", 6)])
def test_an_actor_s_memory_is_bounded_whatever_the_images(kind: str, gigabytes: float) -> None:
    """Thirty images of 100 megapixels are 9 GB of pixels."""
    command = [sys.executable, "-m", "tests.pipeline.large_images", kind, "30"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    sys.stdout.write(f"\n{found}\n")
    assert (found["images"], found["failed"]) == (30, {})
    assert found["peak_bytes"] < gigabytes * 1e9

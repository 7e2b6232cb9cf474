"""How large it may get: ten million images planned, a hundred thousand commits read again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import write_report
from pipeline.results import open_results
from pipeline.table_index import Filter, opened_index
from tests.pipeline.large_tables import IMAGES_PER_COMMIT, write_table
from tests.pipeline.million_rows import write_million

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
    """Sixteen images of 100 megapixels are 4.8 GB of pixels, beside the gigabyte that torch and the model take."""
    command = [sys.executable, "-m", "tests.pipeline.large_images", kind, "16"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    sys.stdout.write(f"\n{found}\n")
    assert (found["images"], found["failed"]) == (16, {})
    assert found["peak_bytes"] < gigabytes * 1e9


@pytest.mark.slow
def test_a_million_rows_are_browsed_and_reported_on(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    for run in ("r1", "r2"):
        write_million(
            output, run, 100_000 if run == "r2" else 50_000
        )  # the second holds the images of the first, and more
    results = open_results(output)
    assert results.instances().count_rows() == 999_000
    began = time.perf_counter()
    with opened_index(results) as index:
        opened = time.perf_counter() - began
        filters = [
            Filter(),
            Filter(order="best"),
            Filter(category="ring", min_score=0.9, order="most"),
            Filter(min_area=80_000, max_score=0.2, order="worst"),
            Filter(text="photograph-00431", status="ok"),
            Filter(status="truncated", run="r2", order="fewest"),
        ]
        seconds = []
        for wanted in filters:
            began = time.perf_counter()
            assert index.page(wanted)["total"] > 0
            seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    write_report(results, "r2")
    report = time.perf_counter() - began
    found = {"opened": opened, "filters": seconds, "report": report}
    sys.stdout.write(f"\n{found}\n")

"""Nights by ``ray job submit``: each does what is new and says what changed; a stopped one loses nothing."""

from __future__ import annotations

import html
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.structures import ImageSize
from pipeline.report import find_drift
from pipeline.results import open_results
from pipeline.run_statistics import read_statistics
from pipeline.scenes import draw_scene
from tests.jobs.job_server import JobServer, running_job_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIZE = ImageSize(96, 96)
RUNTIME_ENV = {
    "env_vars": {
        # Nodes have maskline already: here as a checkout that all see, elsewhere in their image, and then this line is
        # not needed. Nothing is uploaded; of a working_dir Ray takes up to 512 MiB.
        "PYTHONPATH": str(ROOT),
        # ray job stop kills after 3 s unless told otherwise. A run finishes its shards in up to 20 s, has them counted
        # and reported, and is gone after 80 s whatever happens.
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
    }
}


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with running_job_server() as server:
        yield server


def photograph(archive: Path, seeds: range, *, dimmed: int = 1) -> None:
    """As many new images as there are seeds."""
    archive.mkdir(exist_ok=True)
    for seed in seeds:
        Image.fromarray(draw_scene(seed, SIZE).image // dimmed).save(archive / f"{seed:05d}.jpg", quality=90)


def segment(archive: Path, output: Path, *options: str) -> list[str]:
    """What ``ray job submit`` is to run."""
    return [
        *("python", "-m", "jobs", "segment", str(archive), "--output", str(output), "--weights", "demo"),
        *("--actors", "2", "--cpus-per-actor", "1", "--json", *options),
    ]


def submission(night: str, *command: str) -> list[str]:
    """The arguments of ``ray job submit``."""
    return ["--submission-id", f"nightly-{night}", "--runtime-env-json", json.dumps(RUNTIME_ENV), "--", *command]


def summary_in(log: str) -> dict[str, Any]:
    """The last JSON line of a job."""
    found: dict[str, Any] = json.loads([line for line in log.splitlines() if line.startswith("{")][-1])
    return found


def ends_well(server: JobServer, night: str, *command: str) -> dict[str, Any]:
    """Submit, wait; the summary of a night that left nothing undone."""
    submitted = server.job("submit", *submission(night, *command))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert server.details(f"nightly-{night}")["status"] == "SUCCEEDED"
    summary = summary_in(submitted.stdout)
    assert summary["images_ok"] + summary["images_failed"] == summary["images_planned"]
    assert summary["shards_committed"] == summary["shards_planned"]
    return summary


def assert_refused(server: JobServer, night: str, *command: str) -> None:
    """There is a job of that id."""
    again = server.job("submit", *submission(night, *command))
    assert again.returncode != 0
    assert f"Job with submission_id nightly-{night} already exists" in again.stderr


def assert_counted(server: JobServer, summary: dict[str, Any]) -> None:
    """What Prometheus scrapes of a run is what the table holds of it."""
    results = open_results(summary["output"])
    of_run = results.of_run(summary["run_id"])
    statuses = of_run.images().to_table(columns=["status"])["status"].to_pylist()
    found = server.scraped(summary["run_id"])
    assert found["images_total", "ok"] == statuses.count("ok") == summary["images_ok"]
    failed = sum(value for key, value in found.items() if key[:2] == ("images_total", "failed"))
    assert failed == statuses.count("failed") == summary["images_failed"]
    assert found.get(("instances_total",), 0) == of_run.instances().count_rows() == summary["instances"]
    commits = [commit for commit in results.commits if commit.run_id == summary["run_id"]]
    assert found["commits_total", "won"] == len(commits) == summary["shards_committed"]


def verdict(summary: dict[str, Any]) -> str:
    """What the report of a run says beside the run before it."""
    results = open_results(summary["output"])
    drift = find_drift(results, read_statistics(results, summary["run_id"], num_samples=0))
    assert drift is not None
    assert html.escape(drift.verdict) in Path(summary["report"]).read_text()
    return drift.verdict


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_a_night_does_what_is_new_and_says_what_changed(server: JobServer, tmp_path: Path) -> None:
    archive, output = tmp_path / "archive", tmp_path / "out"
    command = segment(archive, output, "--images-per-shard", "10")
    photograph(archive, range(100))
    first = ends_well(server, "2026-11-26", *command)
    assert (first["images_planned"], first["images_ok"]) == (100, 100)

    photograph(archive, range(100, 150))
    second = ends_well(server, "2026-11-27", *command)
    assert (second["images_already_done"], second["images_planned"], second["images_ok"]) == (100, 50, 50)
    assert verdict(second) == "No drift: this run is like the one before."

    before = files_of(output)
    assert_refused(server, "2026-11-27", *command)
    idle = ends_well(server, "2026-11-28", *command)
    assert (idle["images_already_done"], idle["images_planned"]) == (150, 0)
    assert files_of(output) == before

    photograph(archive, range(150, 200), dimmed=8)
    (archive / "damaged.jpg").write_bytes(b"no image")
    dark = ends_well(server, "2026-11-29", *command)
    assert (dark["images_already_done"], dark["images_ok"], dark["failed_by_reason"]) == (150, 50, {"unreadable": 1})
    assert verdict(dark).startswith("Drift: ")
    assert "instances per image changed much" in verdict(dark)

    for summary in (first, second, dark):  # the node still serves the numbers of earlier nights
        assert_counted(server, summary)


def test_a_stopped_night_is_finished_by_the_next(server: JobServer, tmp_path: Path) -> None:
    archive, output, num_images = tmp_path / "archive", tmp_path / "out", 120
    photograph(archive, range(1000, 1000 + num_images))
    command = segment(archive, output, "--images-per-shard", "4")
    submitted = subprocess.Popen(
        server.command("submit", *submission("2026-11-30", *command)),
        env=server.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: "nightly-2026-11-30" in server.jobs())
    assert_refused(server, "2026-11-30", *command)
    wait_for(lambda: any(output.glob("_commits/*.json")))
    stopped = server.job("stop", "nightly-2026-11-30")
    assert stopped.returncode == 0, stopped.stderr
    assert server.details("nightly-2026-11-30")["status"] == "STOPPED"
    assert submitted.wait(30) == 0  # Ray's: only a job that failed ends it with 1, so ask for the status

    log = server.job("logs", "nightly-2026-11-30").stdout
    assert "SIGTERM: finishing what is under way" in log
    half = summary_in(log)
    assert half["stopped"]
    assert f"stopped with {half['shards_planned'] - half['shards_committed']} of 30 shards to do" in log
    kept = keys_of(output)
    assert 0 < len(kept) == half["images_ok"] < num_images
    assert_counted(server, half)

    rest = ends_well(server, "2026-12-01", *command)
    assert (rest["images_already_done"], rest["images_planned"]) == (len(kept), num_images - len(kept))
    keys = keys_of(output)
    assert len(keys) == len(set(keys)) == num_images
    assert set(kept) < set(keys)


def test_a_wrong_request_fails_its_job(server: JobServer, tmp_path: Path) -> None:
    photograph(tmp_path / "archive", range(1))
    command = segment(tmp_path / "archive", tmp_path / "out", "--weights-sha256", 64 * "0")
    submitted = server.job("submit", *submission("wrong", *command))
    assert submitted.returncode == 1
    assert "this is not the file you pinned" in submitted.stdout
    details = server.details("nightly-wrong")
    assert (details["status"], details["driver_exit_code"]) == ("FAILED", 2)
    assert not (tmp_path / "out").exists()


def test_who_has_no_token_submits_nothing(server: JobServer) -> None:
    others = {name: value for name, value in server.environment.items() if not name.startswith("RAY_AUTH_")}
    command = server.command("submit", *submission("stranger", "true"))
    refused = subprocess.run(
        command, env=others | {"RAY_AUTH_TOKEN_PATH": os.devnull}, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stderr


def keys_of(output: Path) -> list[str]:
    keys: list[str] = open_results(str(output)).images().to_table(columns=["image_key"])["image_key"].to_pylist()
    return keys


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)

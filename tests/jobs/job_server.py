"""A Ray cluster of one node as ``ray start`` makes it, its dashboard's job server, and ``ray job`` as a user types it.

The dashboard listens on the loopback, and who has no token is refused. Only what was started here is ever signalled.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.reference import processes

START_SECONDS = 120.0
"""A head node that does not answer for so long will not."""
NUM_CPUS = 2

RAY = (sys.executable, "-m", "ray.scripts.scripts")
"""The command ``ray``."""


@dataclass(frozen=True, kw_only=True)
class JobServer:
    """Of a cluster that runs."""

    url: str
    metrics: str
    """What Prometheus scrapes."""
    environment: dict[str, str] = field(repr=False)
    """With the token; no other cluster is named in it."""

    def job(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``ray job VERB`` to its end."""
        return subprocess.run(
            self.command(verb, *arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def command(self, verb: str, *arguments: str) -> list[str]:
        """``ray job VERB``, which is to be run in the environment."""
        return [*RAY, "job", verb, "--address", self.url, *arguments]

    def details(self, submission_id: str) -> dict[str, Any]:
        """What the server knows of a job: its status, and the exit status of its driver."""
        found: dict[str, Any] = json.loads(self._get(f"{self.url}/api/jobs/{submission_id}"))
        return found

    def jobs(self) -> list[str]:
        """The ids of all jobs, whatever became of them."""
        return [job["submission_id"] for job in json.loads(self._get(f"{self.url}/api/jobs/"))]

    def scraped(self, run_id: str) -> dict[tuple[str, ...], float]:
        """Of one run: name and the tags that are not empty → value."""
        families = text_string_to_metric_families(self._get(self.metrics))
        return {
            (
                sample.name.removeprefix("ray_maskline_"),
                *(sample.labels[tag] for tag in ("status", "reason", "commit") if sample.labels.get(tag)),
            ): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("ray_maskline_") and sample.labels["run"] == run_id
        }

    def answers(self) -> bool:
        """The job server, and the node's agent, which starts jobs and serves metrics."""
        try:
            return self.jobs() == [] and bool(self._get(self.metrics))
        except OSError:
            return False

    def _get(self, url: str) -> str:
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=token), timeout=20) as answer:
            text: str = answer.read().decode()
            return text


@contextmanager
def running_job_server() -> Iterator[JobServer]:
    """Started, and ended with all that came of it."""
    dashboard, metrics, *others = _unused_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's python is this one
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_worker_niceness": "0",  # actors are not to wait for all else that the machine does
    }
    command = [
        *(*RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus", str(NUM_CPUS)),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        f"--metrics-export-port={metrics}",
        # Ray's defaults for these belong to whatever cluster is on this machine already
        *(f"--port={others[0]}", f"--dashboard-agent-listen-port={others[1]}", f"--ray-client-server-port={others[2]}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={80 * 1024**2}"),
    ]
    server = JobServer(
        url=f"http://127.0.0.1:{dashboard}", metrics=f"http://127.0.0.1:{metrics}/metrics", environment=environment
    )
    # its own folder, so that nobody finds this cluster by "auto"; a short path, for sockets lie in it
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "start.log"
        with log.open("wb") as file:
            head = subprocess.Popen([*command, f"--temp-dir={folder}"], env=environment, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not server.answers():
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield server
        finally:
            _end(head)


def _end(head: subprocess.Popen[bytes]) -> None:
    """As ``ray stop`` would, but of this cluster alone."""
    family = processes.descendants(head.pid)
    head.terminate()
    with suppress(subprocess.TimeoutExpired):
        head.wait(30)
    for pid in [*family, head.pid]:
        if "ray" in processes.command(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    head.wait(30)


def _unused_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]

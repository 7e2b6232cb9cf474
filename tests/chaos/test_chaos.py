"""Twenty faults on a small archive; ``make chaos`` has two hundred on a larger one."""

from __future__ import annotations

import subprocess
import sys


def test_twenty_faults_lose_and_double_nothing() -> None:
    command = [sys.executable, "-m", "tests.chaos.run", "20", "600", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert run.returncode == 0, run.stdout + run.stderr[-9000:]
    assert "20 faults" in run.stdout
    assert "not as the undisturbed table: none" in run.stdout

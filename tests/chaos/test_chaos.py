"""Twenty faults on a small archive; ``make chaos`` has two hundred on a larger one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import run_chaos


@pytest.mark.slow  # a driver starts anew after most faults
def test_twenty_faults_lose_and_double_nothing(tmp_path: Path) -> None:
    outcome = run_chaos(tmp_path, num_faults=20, num_images=1_000, seed=1)
    assert outcome.faults.total() == 20
    assert not outcome.wrong

from __future__ import annotations

import io
import logging
import re
import time

import pytest
from rich.console import Console

from pipeline.progress import ProgressView
from pipeline.schedule import Tick


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=200)


def shown_on(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


TICK = Tick(shards_done=1, images_done=50, images_failed=2, actors_up=1, actors_asked=2)


def test_a_log_gets_a_plain_line_at_most_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with ProgressView(200, 4, bar=False) as view:
        for second in range(31):
            clock[0] = 100.0 + second
            view(TICK)
    assert len(caplog.messages) == 3
    assert caplog.messages[0] == "images=50/200 shards=1/4 images_per_second=5.0 eta=30s failed=2 actors=1/2"


def test_a_terminal_gets_a_bar() -> None:
    screen = terminal()
    with ProgressView(200, 4, bar=True, console=screen) as view:
        view(TICK)
    assert "50/200" in shown_on(screen)
    assert "2 failed" in shown_on(screen)


def test_waiting_for_actors_is_said() -> None:
    screen = terminal()
    with ProgressView(200, 4, bar=True, console=screen) as view:
        view(Tick(shards_done=0, images_done=0, images_failed=0, actors_up=0, actors_asked=2))
    assert "waiting for 2 actors" in shown_on(screen)

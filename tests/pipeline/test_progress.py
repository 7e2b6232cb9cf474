from __future__ import annotations

import io
import re
import time

import pytest

from pipeline.progress import ProgressView
from pipeline.schedule import Tick


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TICK = Tick(shards_done=1, images_done=50, images_failed=2, actors_up=1, actors_asked=2)


def test_a_log_gets_a_plain_line_at_most_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    log = io.StringIO()
    with ProgressView(200, 4, log) as view:
        for second in range(31):
            clock[0] = 100.0 + second
            view(TICK)
    lines = log.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "images=50/200 shards=1/4 images_per_second=5.0 eta=30s failed=2 actors=1/2"


def test_a_terminal_gets_a_bar() -> None:
    screen = Terminal()
    with ProgressView(200, 4, screen) as view:
        view(TICK)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "50/200" in shown
    assert "2 failed" in shown


def test_waiting_for_actors_is_said() -> None:
    screen = Terminal()
    with ProgressView(200, 4, screen) as view:
        view(Tick(shards_done=0, images_done=0, images_failed=0, actors_up=0, actors_asked=2))
    assert "waiting for 2 actors" in screen.getvalue()

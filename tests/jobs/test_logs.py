from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from jobs import logs


@pytest.fixture
def said() -> Iterator[io.StringIO]:
    """A root handler alone, and all levels as they were afterwards."""
    root, names = logging.getLogger(), ("", "jobs", "pipeline", "pipeline.progress", "stamina")
    before, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    said = io.StringIO()
    root.handlers[:] = [logging.StreamHandler(said)]
    logs.set_up()
    root.setLevel(logging.WARNING)
    yield said
    root.handlers[:] = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def speak() -> None:
    logging.getLogger("jobs.segment").info("%d images listed", 7)
    logging.getLogger("pipeline.schedule").info("shard done shard=%s images=%d seconds=%.1f", "ab\n1", 50, 2.25)
    logging.getLogger("pipeline.retry").warning("tried again call=%s error=%s: %s", "read", "OSError", "lost")
    logging.getLogger("botocore").info("not asked for")


def test_people_read_what_is_done_and_warnings(said: io.StringIO) -> None:
    speak()
    assert said.getvalue().splitlines() == [
        "7 images listed",
        "WARNING pipeline.retry: tried again call=read error=OSError: lost",
    ]


def test_machines_read_an_object_for_each_event(said: io.StringIO) -> None:
    logs.as_json()
    speak()
    try:
        raise ValueError("no number")
    except ValueError:
        logging.getLogger("jobs.segment").exception("failed")
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [event["message"] for event in events] == [
        "7 images listed",
        "shard done shard=ab\n1 images=50 seconds=2.2",
        "tried again call=read error=OSError: lost",
        "failed",
    ]
    assert (events[1]["shard"], events[1]["images"], events[1]["seconds"]) == ("ab\n1", 50, 2.25)
    assert (events[2]["call"], events[2]["error"], events[2]["level"]) == ("read", "OSError", "warning")
    assert events[0]["time"].endswith("+00:00")
    assert "no number" in events[3]["exception"]

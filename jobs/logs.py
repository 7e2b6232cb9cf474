"""What a command says while it works, on standard error: lines for people, or a JSON object each for machines.

Messages name their values, ``shard done shard=%s images=%d``; as JSON each of them is a field of its own.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

VALUE = re.compile(r"(?:(\w+)=)?%[-+ 0#]*\d*(?:\.\d+)?[sdfr]")
"""A place for a value in a message, and the name before it, if it has one."""


class Lines(logging.Formatter):
    """What a command does stands alone; warnings say where they come from."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        message = super().format(record)
        return message if record.levelno == logging.INFO else f"{record.levelname} {record.name}: {message}"


class JsonLines(logging.Formatter):
    """time (UTC), level, logger and message, and the named values of the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(_named_values(record) | entry, default=str)


def _named_values(record: logging.LogRecord) -> dict[str, Any]:
    values = record.args if isinstance(record.args, tuple) else ()
    names = VALUE.findall(str(record.msg))
    return {name: value for name, value in zip(names, values, strict=False) if name}


def set_up() -> None:
    """Lines for people: what the command does, and warnings from everywhere."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Lines())
    for name in ("jobs", "pipeline.progress"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("stamina").setLevel(logging.ERROR)  # pipeline/retry.py says once what stamina says each time


def as_json() -> None:
    """From now on JSON, with a line for each shard too."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())
    logging.getLogger("pipeline").setLevel(logging.INFO)

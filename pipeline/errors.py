"""Every error a user can meet, as one tree.

    PipelineError
    ├── ConfigError        the request is wrong; nothing was started (exit 2)
    ├── ArchiveError       an archive or a manifest could not be listed or read
    ├── DecodeError        the bytes of one image could not be turned into pixels: a failed row
    ├── CommitError        a shard's results could not be published
    └── ShardError         a shard has no committed rows after its last attempt (exit 1)

Foreign errors are mapped at one edge, with ``from``. ``model/`` raises ValueError.
"""

from __future__ import annotations

from typing import Literal, get_args

Reason = Literal[
    "unreadable",
    "truncated",
    "too_large",
    "unsupported",
    "missing",
    "empty",
    "killed_worker",
    "timeout",
]
"""Why an image failed. The fixed list that the column ``images.reason`` holds."""

REASONS: tuple[Reason, ...] = get_args(Reason)


class PipelineError(Exception):
    """The root: catching it catches everything this package raises on purpose."""


class ConfigError(PipelineError):
    """The request is wrong. The message says what, the bound, and the next step."""


class ArchiveError(PipelineError):
    """An archive or a manifest could not be listed or read."""

    def __init__(self, uri: str, reason: Reason, detail: str) -> None:
        super().__init__(uri, reason, detail)  # the fields, so it survives pickling
        self.uri, self.reason, self.detail = uri, reason, detail

    def __str__(self) -> str:
        return f"cannot read {self.uri}: {self.reason}: {self.detail}"


class DecodeError(PipelineError):
    """The bytes of one image could not be turned into pixels."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class CommitError(PipelineError):
    """A shard's results could not be published."""


class ShardError(PipelineError):
    """A shard has no committed rows after its last attempt."""

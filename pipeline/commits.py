"""The commit protocol: a shard's rows count from the moment its commit object exists, and not before.

    OUT/_maskline.json                      the table's format version, created once
    OUT/_attempts/<shard>/<attempt>.json    written before a shard is touched
    OUT/_commits/<shard>.json               create-only, one PUT: the commit

A PUT whose answer is lost may have succeeded, so every answer but "created" is settled by reading the commit: absent
is tried again, ours is won, another attempt's is lost. Losing is harmless: file names are never reused, nothing is
deleted.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.errors import CommitError, ConfigError
from pipeline.retry import retry_after

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Of the results table. A table of a later version is refused."""

COMMIT_BUDGET_SECONDS = 180.0
"""How long one commit is tried while the store gives no clear answer."""

READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class CommittedFile:
    """One Parquet file that a commit publishes."""

    table: Literal["images", "instances"]
    path: str
    """Relative to the table's root."""
    bytes: int
    rows: int
    sha256: str

    def __post_init__(self) -> None:
        _check_kinds(self, strings=("path", "sha256"), counts=("bytes", "rows"))
        if self.table not in ("images", "instances"):
            raise ValueError(f"table must be images or instances, got {self.table!r}")
        if not self.path.startswith(f"{self.table}/") or ".." in self.path.split("/"):
            raise ValueError(f"path must lie in the table's own folder {self.table}/, got {self.path!r}")


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What one shard's winning attempt published. The content of ``_commits/<shard>.json``."""

    shard_id: str
    attempt_id: str
    run_id: str
    """Sortable by time; of two commits of one image the later run's counts."""
    weights_sha256: str
    settings_hash: str
    inputs_hash: str
    """Of the image keys and source versions, in order."""
    images: int
    failed_by_reason: dict[str, int]
    instances: int
    files: tuple[CommittedFile, ...]

    def __post_init__(self) -> None:
        strings = ("shard_id", "attempt_id", "run_id", "weights_sha256", "settings_hash", "inputs_hash")
        _check_kinds(self, strings=strings, counts=("images", "instances"))
        if not isinstance(self.failed_by_reason, dict):
            raise ValueError(f"failed_by_reason must map reasons to counts, got {self.failed_by_reason!r}")

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> Commit:
        """
        Raises:
            ValueError: it is not the JSON of a commit.
        """
        try:
            fields: dict[str, Any] = json.loads(data)
            files = tuple(CommittedFile(**file) for file in fields.pop("files"))
            return Commit(files=files, **fields)
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _check_kinds(record: object, *, strings: tuple[str, ...], counts: tuple[str, ...]) -> None:
    """Records come from files that anyone may have written."""
    for name in strings:
        if not isinstance(getattr(record, name), str):
            raise ValueError(f"{name} must be text, got {getattr(record, name)!r}")
    for name in counts:
        value = getattr(record, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")


def create_table(output: str) -> None:
    """Write ``_maskline.json`` if it is not there; refuse a table that a later version wrote.

    Raises:
        ConfigError: the table's format version is not ours.
    """
    uri = storage.join(output, "_maskline.json")
    if not storage.exists(uri):  # whoever writes it writes the same
        storage.write_bytes(uri, json.dumps({"format_version": FORMAT_VERSION}).encode())
    check_table(output)


def check_table(output: str) -> None:
    """Refuse what is not a results table of this version.

    Raises:
        ConfigError: there is no ``_maskline.json``, or its version is not ours.
    """
    uri = storage.join(output, "_maskline.json")
    try:
        version = json.loads(storage.read_bytes(uri))["format_version"]
    except FileNotFoundError as error:
        raise ConfigError(f"{output} is not a results table: it holds no _maskline.json; check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{uri} is damaged: it should read {{'format_version': {FORMAT_VERSION}}}") from error
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{output} has format version {version}, this maskline writes {FORMAT_VERSION}: use another --output"
        )


def read_table(output: str) -> list[Commit]:
    """Every commit of a table that may not exist yet.

    Raises:
        ConfigError: a table of another version is there.
    """
    if not storage.exists(storage.join(output, "_maskline.json")):
        return []
    check_table(output)
    return read_commits(output)


def begin_attempt(output: str, shard_id: str, attempt_id: str, *, run_id: str, host: str, suspect: bool) -> None:
    """Leave a trace of an attempt before any of its work, so that attempts which die can be counted."""
    record = {"run_id": run_id, "host": host, "suspect": suspect, "started": time.time()}
    storage.write_bytes(
        storage.join(output, "_attempts", shard_id, f"{attempt_id}.json"), json.dumps(record, sort_keys=True).encode()
    )


def count_attempts(output: str) -> Counter[str]:
    """Shard id → how many attempts were ever begun at it, by any run."""
    return Counter(file.uri.rsplit("/", 2)[-2] for file in storage.list_files(storage.join(output, "_attempts")))


def publish(output: str, commit: Commit, *, exclusive: bool) -> Literal["won", "lost"]:
    """Make a shard's files count, or find that another attempt's already do.

    Args:
        exclusive: the store honours create-only. Where it does not, the last writer wins and nothing is deleted, so
            the table is whole either way.

    Raises:
        CommitError: the store gave no clear answer for COMMIT_BUDGET_SECONDS.
    """
    uri = commit_uri(output, commit.shard_id)
    data = commit.to_json()
    if not exclusive:
        storage.write_bytes(uri, data)
        return "won"
    deadline = time.monotonic() + COMMIT_BUDGET_SECONDS
    pause, last_error = 0.1, None
    while True:
        asked = 0.0  # the wait that the store asks for
        try:
            if storage.create_exclusive(uri, data):
                return "won"
        except OSError as error:  # the answer is unknown: the PUT may have succeeded
            last_error = error
            asked = retry_after(error) or 0.0
            logger.warning("commit answer unknown shard=%s error=%s", commit.shard_id, error)
        winner = None
        try:
            winner = read_commit(output, commit.shard_id)
        except OSError as error:
            last_error = error
        if winner is not None:
            return "won" if winner.attempt_id == commit.attempt_id else "lost"
        if time.monotonic() > deadline:
            raise CommitError(
                f"cannot commit shard {commit.shard_id}: no clear answer for {COMMIT_BUDGET_SECONDS:.0f} s, "
                f"last: {last_error}; its files stay unread, run the same command again"
            ) from last_error
        time.sleep(max(asked, pause * random.uniform(0.5, 1.5)))
        pause = min(2 * pause, 10.0)


def commit_uri(output: str, shard_id: str) -> str:
    """Where a shard's commit stands."""
    return storage.join(output, "_commits", f"{shard_id}.json")


def read_commit(output: str, shard_id: str) -> Commit | None:
    """The commit of one shard, or None."""
    try:
        return Commit.from_json(storage.read_bytes(commit_uri(output, shard_id)))
    except FileNotFoundError:
        return None


def read_commits(output: str) -> list[Commit]:
    """Every commit of the table, in the order of their runs.

    Raises:
        CommitError: a commit object cannot be understood. It is named; nothing is guessed.
    """
    uris = [file.uri for file in storage.list_files(storage.join(output, "_commits")) if file.uri.endswith(".json")]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return sorted(pool.map(_parse, uris), key=lambda commit: (commit.run_id, commit.shard_id))


def _parse(uri: str) -> Commit:
    try:
        return Commit.from_json(storage.read_bytes(uri))
    except ValueError as error:
        raise CommitError(f"{uri} is not a commit of this format: {error}") from error


def iterate_files(commits: Sequence[Commit], table: Literal["images", "instances"]) -> Iterator[CommittedFile]:
    """The committed files of one table."""
    return (file for commit in commits for file in commit.files if file.table == table)

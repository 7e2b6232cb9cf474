"""Encoded images of an object store, kept on local disk up to a bound, for jobs that read them again and again.

Processes of a node share the folder. A file appears whole, by a rename; the least recently used go first.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

from pipeline import storage
from pipeline.uris import is_local

_SLACK = 1 / 16
"""Share of the bound that one process may write before it looks at what all have written."""

_NAME = re.compile(r"[0-9a-f]{64}([.][0-9a-f]{32})?")
"""Of our files, aside or not; whatever else is in the folder is somebody's."""


class ImageCache:
    """Reads by URI; local files are read where they are."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._unchecked_bytes = 0

    def read(self, uri: str) -> bytes:
        """The object's bytes; ``FileNotFoundError`` if there is none."""
        if is_local(uri):
            return storage.read_bytes(uri)
        path = self.folder / hashlib.sha256(uri.encode()).hexdigest()
        with suppress(OSError):
            data = path.read_bytes()
            with suppress(OSError):  # another user's file
                os.utime(path)
            return data
        data = storage.read_bytes(uri)
        if len(data) <= self.max_bytes:
            self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(data)
            aside.replace(path)
        except OSError:  # a full disk: the cache is a convenience
            with suppress(OSError):
                aside.unlink()
        self._unchecked_bytes += len(data)
        if self._unchecked_bytes > self.max_bytes * _SLACK:
            self._unchecked_bytes = 0
            with suppress(OSError):
                self._make_room()

    def _make_room(self) -> None:
        files = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):
                if _NAME.fullmatch(entry.name):
                    files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes * (1 - _SLACK):
                return
            with suppress(OSError):
                os.unlink(path)
            total -= size

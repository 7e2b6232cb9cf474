"""A stored object as a seekable file, each piece one range read that is retried by itself.

A URI and its size enter; a binary file leaves. Local files are opened plainly. Nothing is downloaded to disk.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence
from typing import BinaryIO, cast

from pipeline import storage
from pipeline.uris import local_path

Span = tuple[int, int]
"""Start and stop of a run of bytes."""

MERGE_GAP_BYTES = 256 * 1024
"""Neighbouring reads less than this apart are one request: the gap costs less than another round trip."""

MERGED_BYTES = 8 * 1024 * 1024
"""Merged reads stop growing here; a single longer one stays whole."""


def open_object(uri: str, size: int, block_bytes: int) -> BinaryIO:
    """The object for reading; remote reads fetch ``block_bytes`` at a time."""
    path = local_path(uri)
    if path is not None:
        return open(path, "rb")
    return cast(BinaryIO, RangeFile(uri, size, block_bytes))


def is_damage(error: Exception, file: BinaryIO) -> bool:
    """Whether an error met while parsing ``file`` speaks of its content, and not of the store it lies in."""
    if getattr(file, "failure", None) is not None:
        return False
    return not isinstance(error, OSError) or error.errno in (None, errno.EINVAL)  # EINVAL: a seek to a senseless place


class RangeFile(io.RawIOBase):
    """The bytes of a remote object of known size; the last block read is kept."""

    def __init__(self, uri: str, size: int, block_bytes: int) -> None:
        super().__init__()
        self.failure: Exception | None = None
        self._uri, self._size, self._block_bytes = uri, size, block_bytes
        self._position, self._block_start, self._block = 0, 0, b""
        self._plan: list[Span] = []

    def plan(self, spans: Sequence[Span]) -> None:
        """Say what will be read, in order; reads that begin inside a span fetch it to its end."""
        self._plan = merge_spans(spans)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "seek before the start", self._uri)
        self._position = start + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]  # the buffer protocol has no name before 3.12
        done = 0
        while done < len(view) and self._position < self._size:
            inside = self._position - self._block_start
            if not 0 <= inside < len(self._block):
                self._fetch(len(view) - done)
                inside = 0
                if not self._block:  # the object has become shorter
                    break
            piece = self._block[inside : inside + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
            self._position += len(piece)
        return done

    def _fetch(self, wanted: int) -> None:
        start = self._position
        stop = next((stop for first, stop in self._plan if first <= start < stop), start + self._block_bytes)
        length = min(max(stop - start, wanted), self._size - start)
        try:
            self._block = storage.read_range(self._uri, start, length)
        except Exception as error:
            self.failure = error
            raise
        self._block_start = start


def merge_spans(spans: Sequence[Span]) -> list[Span]:
    """Join spans that follow one another closely, keeping their order."""
    return [(spans[group[0]][0], max(spans[index][1] for index in group)) for group in group_spans(spans)]


def group_spans(spans: Sequence[Span]) -> list[list[int]]:
    """The indices of the spans that are read as one, for each such read."""
    groups: list[list[int]] = []
    first, last = 0, 0  # of the group so far
    for index, (start, stop) in enumerate(spans):
        if groups and first <= start <= last + MERGE_GAP_BYTES and max(stop, last) - first <= MERGED_BYTES:
            groups[-1].append(index)
            last = max(stop, last)
        else:
            groups.append([index])
            first, last = start, stop
    return groups

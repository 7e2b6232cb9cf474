"""Images in tars (WebDataset), plain and gzipped: listed by their headers, read by ranges or in one pass.

A tar's ``FileInfo`` enters; items leave. Items enter; payloads leave. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, cast

from pipeline import storage
from pipeline.errors import ArchiveError, DecodeError, Reason
from pipeline.items import ArchiveLimits, Item, Listing, damaged, is_image_name, printable
from pipeline.ordered_reads import in_order
from pipeline.range_file import group_spans, is_damage, open_object
from pipeline.storage import FileInfo
from pipeline.uris import local_path

HEADER_BLOCK_BYTES = 32 * 1024
"""Read ahead while walking a remote tar's headers: small, since the images between them are skipped."""

STREAM_BLOCK_BYTES = 8 * 1024 * 1024
"""Read ahead while streaming a remote tar.gz."""

MAX_HEADER_BYTES = 1024 * 1024
"""Longest name or attribute block of one member; tarfile reads these whole."""

PARSE_ERRORS = (
    tarfile.TarError,
    EOFError,
    OSError,  # gzip.BadGzipFile; is_damage() tells it from the store's errors
    OverflowError,
    LookupError,
    ValueError,
    struct.error,
    zlib.error,
)


class _Header(tarfile.TarInfo):
    """A header that fails loudly: tarfile takes a damaged one after the first member for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            match type(error).__name__:
                case "EOFHeaderError":
                    raise
                case "InvalidHeaderError":
                    raise tarfile.ReadError(f"damaged header: {error}") from error
                case _:
                    raise EOFError("the end-of-archive mark is missing") from error
        if header.size < 0:
            raise tarfile.ReadError(f"damaged header: a size of {header.size}")
        if header.type in b"LKxgX" and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"damaged header: {header.size} bytes of name or attributes")
        return header


class _Unpacked(io.RawIOBase):
    """The unpacked side of a .gz, which stops at a suspicious compression ratio."""

    def __init__(self, packed: BinaryIO, info: FileInfo, limits: ArchiveLimits) -> None:
        super().__init__()
        self._packed, self._info, self._limits = packed, info, limits
        self._unpacked = gzip.GzipFile(fileobj=packed, mode="rb")
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        data = self._unpacked.read1(size)  # what is there; read() would lose it when damage follows
        self.position += len(data)
        packed = self._packed.tell()
        if self._limits.ratio_exceeded(self.position, packed):
            ratio = f"more than {self._limits.max_compression_ratio:g} to 1"
            raise damaged(self._info, "too_large", f"{self.position} bytes unpacked from {packed}, {ratio}")
        return data


def list_tar(info: FileInfo, limits: ArchiveLimits, listing: Listing, *, gzipped: bool) -> Iterator[Item]:
    """One item per image, in order. ``ArchiveError`` at damage, after the whole members before it."""
    kind, key = ("tar.gz" if gzipped else "tar"), printable(info.uri)
    for number, header in enumerate(_whole_members(info, limits, gzipped=gzipped), start=1):
        if number > limits.max_members:
            raise damaged(info, "too_large", f"more than {limits.max_members} members")
        if header.islnk() or header.issym():
            listing.skipped["link"] += 1
        elif header.isreg() and not header.issparse() and is_image_name(header.name):
            name = printable(header.name)
            yield Item(f"{key}#{name}", info.version, kind, key, name, header.offset_data, header.size)
        elif not header.isdir():
            listing.skip(header.name)


def read_tar(info: FileInfo, items: Sequence[Item], threads: int) -> Iterator[bytes | DecodeError]:
    """Payloads of a plain tar in the order of ``items``: one read per image, merged where neighbouring if remote."""
    path = local_path(info.uri)
    if path is not None:
        with open(path, "rb", buffering=0) as file:
            for item in items:
                yield _checked(item, os.pread(file.fileno(), item.bytes, item.offset))
        return
    groups = [[items[index] for index in group] for group in group_spans([_span(item) for item in items])]
    calls = ((_group_bytes(group), partial(_read_group, info.uri, group)) for group in groups)
    for payloads in in_order(calls, min(threads, 4), STREAM_BLOCK_BYTES * 8):
        yield from payloads


def read_tar_gz(info: FileInfo, items: Sequence[Item], limits: ArchiveLimits) -> Iterator[bytes | DecodeError]:
    """Payloads in the order of ``items``, in one pass. One that comes before its turn is held meanwhile."""
    wanted: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        wanted.setdefault(item.offset, []).append(index)
    held: dict[int, bytes | DecodeError] = {}
    turn = 0
    rest = DecodeError("unreadable", f"no longer at its place in {printable(info.uri)}")
    try:
        for offset, payload in _stream_payloads(info, set(wanted), limits):
            held.update((index, payload) for index in wanted[offset])
            while turn in held:
                yield held.pop(turn)
                turn += 1
    except ArchiveError as error:
        rest = DecodeError(error.reason, f"{error.uri}: {error.detail}")
    for index in range(turn, len(items)):
        yield held.get(index, rest)


def _whole_members(info: FileInfo, limits: ArchiveLimits, *, gzipped: bool) -> Iterator[tarfile.TarInfo]:
    """Headers, each held back until its data is known to be there."""
    held: tarfile.TarInfo | None = None
    with open_object(info.uri, info.size, STREAM_BLOCK_BYTES if gzipped else HEADER_BLOCK_BYTES) as file:
        stream = _Unpacked(file, info, limits) if gzipped else None
        try:
            with _damage_named(info, file):
                for header in _headers(file, stream):
                    if held is not None:
                        yield held
                    held = header
        except ArchiveError:
            there = info.size if stream is None else stream.position
            if held is not None and held.offset_data + held.size <= there:
                yield held
            raise
        if held is not None:
            yield held


def _headers(file: BinaryIO, stream: _Unpacked | None) -> Iterator[tarfile.TarInfo]:
    tar = _open_tar(file, stream)
    end = -1
    while (header := tar.next()) is not None:
        if header.size < 0 or tar.offset <= end:  # an attribute block may set the size anew
            raise tarfile.ReadError(f"damaged header: a size of {header.size}")
        end = tar.offset
        yield header
        _forget_members(tar)


def _open_tar(file: BinaryIO, stream: _Unpacked | None) -> tarfile.TarFile:
    if stream is None:
        return tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape")
    return tarfile.open(
        fileobj=cast(BinaryIO, stream), mode="r|", bufsize=256 * tarfile.BLOCKSIZE, tarinfo=_Header,
        encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip


def _forget_members(tar: tarfile.TarFile) -> None:
    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header; the stubs do not show where


def _stream_payloads(
    info: FileInfo, wanted: set[int], limits: ArchiveLimits
) -> Iterator[tuple[int, bytes | DecodeError]]:
    """Offset and payload of the wanted members of a tar.gz, up to the last of them."""
    with open_object(info.uri, info.size, STREAM_BLOCK_BYTES) as file, _damage_named(info, file):
        tar = _open_tar(file, _Unpacked(file, info, limits))
        while wanted and (header := tar.next()) is not None:
            if header.offset_data in wanted:
                wanted.remove(header.offset_data)
                member = tar.extractfile(header)
                assert member is not None, "only regular members are listed"
                yield header.offset_data, member.read()
            _forget_members(tar)


@contextmanager
def _damage_named(info: FileInfo, file: BinaryIO) -> Iterator[None]:
    try:
        if info.size == 0:
            raise damaged(info, "empty", "0 bytes")
        yield
    except PARSE_ERRORS as error:
        if not is_damage(error, file):
            raise
        cut = isinstance(error, EOFError) or "end of data" in str(error)
        reason: Reason = "truncated" if cut else "unreadable"
        raise damaged(info, reason, str(error) or type(error).__name__) from error


def _span(item: Item) -> tuple[int, int]:
    return item.offset, item.offset + item.bytes


def _group_bytes(group: Sequence[Item]) -> int:
    return max(item.offset + item.bytes for item in group) - group[0].offset


def _read_group(uri: str, group: Sequence[Item]) -> list[bytes | DecodeError]:
    start = group[0].offset
    block = storage.read_range(uri, start, _group_bytes(group))
    return [_checked(item, block[item.offset - start : item.offset - start + item.bytes]) for item in group]


def _checked(item: Item, payload: bytes) -> bytes | DecodeError:
    if len(payload) == item.bytes:
        return payload
    return DecodeError("truncated", f"{len(payload)} of {item.bytes} bytes are there")

"""Images in zips: listed from the central directory, read member by member with merged ranges.

A zip's ``FileInfo`` enters; items leave. Items enter; payloads leave. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from pipeline.errors import ArchiveError, DecodeError
from pipeline.items import ArchiveLimits, Item, Listing, damaged, is_image_name, printable
from pipeline.range_file import RangeFile, Span, is_damage, open_object
from pipeline.storage import FileInfo

BLOCK_BYTES = 128 * 1024
"""Read at a time where no span is planned: the end of the file and its central directory."""

LOCAL_HEADER_BYTES = 1024
"""Fixed part, name and extra fields before a member's data; their length is not in the central directory."""

PARSE_ERRORS = (zipfile.BadZipFile, EOFError, OSError, OverflowError, LookupError, ValueError, struct.error, zlib.error)


def list_zip(info: FileInfo, limits: ArchiveLimits, listing: Listing) -> Iterator[Item]:
    """One item per image, in the order of the central directory."""
    key = printable(info.uri)
    with _open_zip(info) as (archive, _):
        entries = archive.infolist()
    for entry in entries[: limits.max_members]:
        if stat.S_ISLNK(entry.external_attr >> 16):
            listing.skipped["link"] += 1
        elif is_image_name(entry.filename):
            name = printable(entry.filename)
            yield Item(f"{key}#{name}", info.version, "zip", key, name, entry.header_offset, entry.file_size)
        elif not entry.filename.endswith("/"):  # a folder; is_dir() fails for an empty name
            listing.skip(entry.filename)
    if len(entries) > limits.max_members:
        raise damaged(info, "too_large", f"more than {limits.max_members} members")


def read_zip(info: FileInfo, items: Sequence[Item], limits: ArchiveLimits) -> Iterator[bytes | DecodeError]:
    """Payloads in the order of ``items``. A member that is damaged is a ``DecodeError`` and the next is read."""
    done = 0
    try:
        with _open_zip(info) as (archive, file):
            entries = {entry.header_offset: entry for entry in archive.infolist()}
            if isinstance(file, RangeFile):
                file.plan([_span(entries[item.offset]) for item in items if item.offset in entries])
            for item in items:
                entry = entries.get(item.offset)
                if entry is None:
                    yield DecodeError("unreadable", f"no longer at its place in {printable(info.uri)}")
                else:
                    yield _read_member(archive, file, entry, limits)
                done += 1
    except ArchiveError as error:
        for _ in items[done:]:
            yield DecodeError(error.reason, f"{error.uri}: {error.detail}")


def _read_member(
    archive: zipfile.ZipFile, file: BinaryIO, entry: zipfile.ZipInfo, limits: ArchiveLimits
) -> bytes | DecodeError:
    if entry.file_size > limits.max_image_bytes:
        return DecodeError("too_large", f"{entry.file_size} bytes, more than {limits.max_image_bytes}")
    if limits.ratio_exceeded(entry.file_size, entry.compress_size):
        ratio = f"more than {limits.max_compression_ratio:g} to 1"
        return DecodeError("too_large", f"{entry.file_size} bytes packed into {entry.compress_size}, {ratio}")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return DecodeError("unsupported", f"zip compression method {entry.compress_type}")
    try:
        with archive.open(entry) as member:
            return member.read()  # never more than file_size, and its CRC-32 is checked
    except RuntimeError as error:  # encrypted, or a feature that zipfile has not
        return DecodeError("unsupported", str(error))
    except PARSE_ERRORS as error:
        if not is_damage(error, file):
            raise
        return DecodeError("truncated" if isinstance(error, EOFError) else "unreadable", str(error) or "cut short")


@contextmanager
def _open_zip(info: FileInfo) -> Iterator[tuple[zipfile.ZipFile, BinaryIO]]:
    if info.size == 0:
        raise damaged(info, "empty", "0 bytes")
    with open_object(info.uri, info.size, BLOCK_BYTES) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (*PARSE_ERRORS, NotImplementedError) as error:
            if not is_damage(error, file):
                raise
            file.seek(0)
            if file.read(4) == b"PK\3\4":
                raise damaged(info, "truncated", f"no central directory at its end ({error})") from error
            raise damaged(info, "unreadable", str(error)) from error
        with archive:
            yield archive, file


def _span(entry: zipfile.ZipInfo) -> Span:
    return entry.header_offset, entry.header_offset + LOCAL_HEADER_BYTES + entry.compress_size

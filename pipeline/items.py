"""What a listing yields: one row per image of an archive, and the bounds that an archive must keep to.

Plain tuples enter; record batches of ``ITEM_SCHEMA`` leave.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import pyarrow as pa

from pipeline.errors import ArchiveError, ConfigError, Reason
from pipeline.storage import FileInfo

ITEM_SCHEMA = pa.schema(
    [
        pa.field("image_key", pa.string(), nullable=False),  # the image's identity for ever
        pa.field("source_version", pa.string(), nullable=False),  # of the object that holds it
        pa.field("kind", pa.string(), nullable=False),  # file, tar, tar.gz, zip, parquet, failed
        pa.field("container", pa.string(), nullable=False),  # the URI to open
        pa.field("member", pa.string(), nullable=False),  # its name in a tar or zip, else ""
        pa.field("offset", pa.int64(), nullable=False),  # of its data in the (unpacked) tar, its header in a zip; row
        pa.field("bytes", pa.int64(), nullable=False),  # encoded size, -1 where the archive does not say
        pa.field("error", pa.string()),  # "reason: detail" of kind failed
    ]
)

ROWS_PER_BATCH = 65_536

IMAGE_EXTENSIONS = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"]
)
"""What is taken for an image in a prefix, a tar or a zip, in any case. A file named explicitly is always taken."""

UNPACKED_FREE_BYTES = 16 * 1024 * 1024
"""Compression ratios are judged beyond so many unpacked bytes: a small blank image may pack to next to nothing."""


class Item(NamedTuple):
    """One row of ``ITEM_SCHEMA``."""

    image_key: str
    source_version: str
    kind: str
    container: str
    member: str = ""
    offset: int = 0
    bytes: int = -1
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may ask of us before it is taken for an accident or an attack."""

    max_image_bytes: int = 256 * 1024 * 1024
    """Encoded bytes of one image; a larger one becomes a row `too_large`."""

    max_members: int = 10_000_000
    """Members of one archive, images or not; the listing of a larger one stops there, with a row `too_large`."""

    max_compression_ratio: float = 200.0
    """Unpacked over packed bytes beyond the first 16 MiB: a zip member, a tar.gz so far, a row group in its file."""

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_members", "max_compression_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def ratio_exceeded(self, unpacked: int, packed: int) -> bool:
        return unpacked > UNPACKED_FREE_BYTES and unpacked > self.max_compression_ratio * packed


DEFAULT_LIMITS = ArchiveLimits()


@dataclass(kw_only=True)
class Listing:
    """What a listing has come across so far; filled in while it streams."""

    images: int = 0
    bytes: int = 0
    """Encoded, as far as the archives say."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files and members left out, by extension; `link` for the links in tars."""
    failed_archives: int = 0
    missing: int = 0
    """Manifest entries and links that lead nowhere. They are images too: each leaves a row."""

    def skip(self, name: str) -> None:
        self.skipped[extension(name) or "(none)"] += 1

    def add(self, other: Listing) -> None:
        self.images += other.images
        self.bytes += other.bytes
        self.skipped += other.skipped
        self.failed_archives += other.failed_archives
        self.missing += other.missing


def item_batches(items: Iterable[Item]) -> Iterator[pa.RecordBatch]:
    """Gather rows into columns; no Python object outlives its batch."""
    rows = iter(items)
    while chunk := list(islice(rows, ROWS_PER_BATCH)):
        columns = zip(*chunk, strict=True)
        arrays = [pa.array(column, part.type) for column, part in zip(columns, ITEM_SCHEMA, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=ITEM_SCHEMA)


def failed_item(info: FileInfo, error: ArchiveError) -> Item:
    """The row that stands for what a damaged archive no longer shows."""
    key = printable(info.uri)
    return Item(key, info.version, "failed", key, "", 0, info.size, f"{error.reason}: {error.detail}")


def damaged(info: FileInfo, reason: Reason, detail: str) -> ArchiveError:
    return ArchiveError(printable(info.uri), reason, detail)


def extension(name: str) -> str:
    """Lower case, with its dot; "" where there is none."""
    base = name.rpartition("/")[2]
    dot = base.rfind(".")
    return base[dot:].lower() if dot > 0 else ""


def is_image_name(name: str) -> bool:
    """By extension. macOS puts a `._x.jpg` of attributes beside each `x.jpg`; that is not an image."""
    return extension(name) in IMAGE_EXTENSIONS and not name.rpartition("/")[2].startswith("._")


def printable(name: str) -> str:
    """A name as text that Arrow can hold: a byte that is not UTF-8 becomes U+FFFD and two hex digits, reversibly."""
    if name.isascii():
        return name
    escaped = name.replace("\ufffd", "\ufffd\ufffd")
    return re.sub("[\udc80-\udcff]", lambda match: f"\ufffd{ord(match[0]) - 0xDC00:02x}", escaped)


def original(name: str) -> str:
    """The name that ``printable`` was given."""
    if "\ufffd" not in name:
        return name
    return re.sub("\ufffd(\ufffd|[0-9a-f]{2})", _unescape, name)


def _unescape(match: re.Match[str]) -> str:
    return "\ufffd" if match[1] == "\ufffd" else chr(0xDC00 + int(match[1], 16))

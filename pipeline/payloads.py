"""The encoded bytes of listed images, in order, whatever holds them.

A table of items (``ITEM_SCHEMA``) enters; for each row its bytes or a ``DecodeError`` leave. A store that fails for
longer than the retries last raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby

import pyarrow as pa

from pipeline import storage
from pipeline.errors import REASONS, DecodeError
from pipeline.items import DEFAULT_LIMITS, ITEM_SCHEMA, ArchiveLimits, Item, original
from pipeline.ordered_reads import in_order
from pipeline.parquet_archive import read_parquet
from pipeline.storage import FileInfo
from pipeline.tar_archive import read_tar, read_tar_gz
from pipeline.uris import is_local
from pipeline.zip_archive import read_zip

Payload = bytes | DecodeError

FILES_PER_TASK = 4
"""Loose files that a thread reads in a row."""

READ_AHEAD_BYTES = 256 * 1024 * 1024
"""Payloads of loose files that wait for their turn, at most; one larger than this waits alone."""


def read_images(
    items: pa.Table, *, limits: ArchiveLimits = DEFAULT_LIMITS, threads: int = 8
) -> Iterator[tuple[int, Payload]]:
    """The row number and encoded bytes of every item, in the table's order; ``DecodeError`` for what is not there.

    Loose files are read ahead by threads; archives are streamed in order, each opened once per run of its items.
    """
    columns = [items.column(name).to_pylist() for name in ITEM_SCHEMA.names]
    rows = (Item(*values) for values in zip(*columns, strict=True))
    index = 0
    for (kind, container), run in groupby(rows, key=_source):
        for payload in _read_run(kind, container, list(run), limits, threads):
            yield index, payload
            index += 1


def _source(item: Item) -> tuple[str, str]:
    return item.kind, "" if item.kind in ("file", "failed") else item.container


def _read_run(kind: str, container: str, items: list[Item], limits: ArchiveLimits, threads: int) -> Iterator[Payload]:
    """The payloads of neighbouring items of one container, or of loose files; too large ones are not read."""
    if kind == "failed":
        yield from map(_recorded_error, items)
        return
    fitting = [item for item in items if item.bytes <= limits.max_image_bytes]
    if kind == "file":
        calls = ((max(item.bytes, 0), partial(_read_loose, item.container, limits)) for item in fitting)
        payloads = in_order(calls, threads, READ_AHEAD_BYTES, per_task=FILES_PER_TASK)
    else:
        payloads = iter(_read_members(kind, container, fitting, limits, threads))
    for item in items:
        if item.bytes <= limits.max_image_bytes:
            yield next(payloads)
        else:
            yield DecodeError("too_large", f"{item.bytes} bytes, more than {limits.max_image_bytes}")


def _read_members(
    kind: str, container: str, items: list[Item], limits: ArchiveLimits, threads: int
) -> Iterable[Payload]:
    if not items:
        return []
    try:
        info = storage.info(original(container))
    except FileNotFoundError:
        return [DecodeError("missing", f"{container} is no longer there")] * len(items)
    if info.version != items[0].source_version:
        changed = f"{container} has changed since it was listed; the next run reads it anew"
        return [DecodeError("missing", changed)] * len(items)
    readers: dict[str, Callable[[FileInfo, list[Item]], Iterator[Payload]]] = {
        "tar": partial(read_tar, threads=threads),
        "tar.gz": partial(read_tar_gz, limits=limits),
        "zip": partial(read_zip, limits=limits),
        "parquet": partial(read_parquet, limits=limits),
    }
    return readers[kind](info, items)


def _read_loose(container: str, limits: ArchiveLimits) -> Payload:
    uri = original(container)
    try:
        # A remote read is bounded, should the object have grown since it was listed.
        payload = storage.read_bytes(uri) if is_local(uri) else storage.read_range(uri, 0, limits.max_image_bytes + 1)
    except OSError as error:
        if error.errno in storage.ABSENT:
            return DecodeError("missing", f"there is nothing at {container}")
        if isinstance(error, IsADirectoryError | PermissionError) and is_local(uri):
            return DecodeError("unreadable", str(error))
        raise  # the store's fault, and no access to a bucket is no image's
    if len(payload) > limits.max_image_bytes:
        return DecodeError("too_large", f"more than {limits.max_image_bytes} bytes")
    return payload


def _recorded_error(item: Item) -> DecodeError:
    reason, _, detail = (item.error or "").partition(": ")
    for known in REASONS:
        if known == reason:
            return DecodeError(known, detail)
    return DecodeError("unreadable", item.error or "the listing failed")

"""An archive: every image that the inputs hold, listed as a stream.

Inputs (folders, prefixes, globs, tars, zips, Parquet tables, manifests) enter; record batches of ``ITEM_SCHEMA``
leave. Their bytes are read by ``payloads.py``. Nothing is downloaded to disk or extracted.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal, NamedTuple

import pyarrow as pa

from pipeline import storage
from pipeline.errors import ArchiveError, ConfigError
from pipeline.globs import is_glob, list_matches
from pipeline.items import (
    DEFAULT_LIMITS,
    IMAGE_EXTENSIONS,
    ITEM_SCHEMA,
    ArchiveLimits,
    Item,
    Listing,
    extension,
    failed_item,
    is_image_name,
    item_batches,
    printable,
)
from pipeline.manifest import manifest_uris, uri_column
from pipeline.ordered_reads import Ahead
from pipeline.parquet_archive import image_column, list_parquet, read_schema
from pipeline.payloads import read_images
from pipeline.storage import MISSING_VERSION, FileInfo
from pipeline.tar_archive import list_tar
from pipeline.uris import is_local, local_path, public_uri, refuse_credentials
from pipeline.zip_archive import list_zip

__all__ = ["IMAGE_EXTENSIONS", "ITEM_SCHEMA", "ArchiveLimits", "Listing", "list_images", "read_images"]

RESULTS_MARKER = "_maskline.json"
"""A folder that holds this is a results table, not an archive."""

ARCHIVE_NAMES = (".tar", ".tar.gz", ".tgz", ".zip", ".parquet")
MANIFEST_NAMES = (".txt", ".csv")

ARCHIVES_AT_ONCE = 16
"""Remote archives whose listings are under way together: a tar's headers are one round trip after another."""
STAT_THREADS = 32
STATS_AT_ONCE = 512

Origin = Literal["named", "found", "listed"]
"""How a file was come by: an input or a glob names it, a folder holds it, a manifest lists it."""


class _Inputs(NamedTuple):
    """What all inputs of one listing share."""

    skip_folder: Callable[[str], bool]
    limits: ArchiveLimits
    listing: Listing


def list_images(
    inputs: Sequence[str],
    *,
    exclude: str | None = None,
    limits: ArchiveLimits = DEFAULT_LIMITS,
    listing: Listing | None = None,
) -> Iterator[pa.RecordBatch]:
    """Every image of the inputs as rows of ``ITEM_SCHEMA``, in an order that depends on the inputs alone.

    A folder or prefix gives its images by extension and the archives in it; what a path, a glob or a manifest names
    is taken whatever its extension. ``exclude`` (our own output) and other results tables are never entered. A
    damaged archive gives the members before the damage and one row of kind ``failed``. ``listing`` counts along.
    ``ConfigError`` for an input that holds no image.
    """
    own_output = public_uri(exclude).rstrip("/") if exclude else None
    shared = _Inputs(lambda folder: folder == own_output, limits, listing if listing is not None else Listing())
    return item_batches(_counted(_all_items(inputs, shared), shared.listing))


# ------------------------------------------------------------------------------------------------------------ listing


def _counted(items: Iterable[Item], listing: Listing) -> Iterator[Item]:
    for item in items:
        if item.kind == "failed":
            listing.failed_archives += 1
        else:
            listing.images += 1
            listing.bytes += max(item.bytes, 0)
            listing.missing += item.source_version == MISSING_VERSION
        yield item


def _all_items(inputs: Sequence[str], shared: _Inputs) -> Iterator[Item]:
    for given in inputs:
        refuse_credentials(given)
        uri = public_uri(given)
        found, skipped_before = False, shared.listing.skipped.copy()
        try:
            for item in _input_items(uri, given.endswith("/"), shared):
                found = True
                yield item
        except FileNotFoundError as error:  # a bucket that is not there
            raise ConfigError(f"nothing to read at {uri}: {error}") from error
        except PermissionError as error:
            raise ConfigError(f"no access to {uri}: {error}") from error
        if not found:
            fresh = shared.listing.skipped - skipped_before
            skipped = ", ".join(f"{count} {name}" for name, count in fresh.most_common(5))
            raise ConfigError(f"no images at {uri}" + (f"; left out: {skipped}" if skipped else "; is the path right?"))


def _input_items(uri: str, is_folder: bool, shared: _Inputs) -> Iterator[Item]:
    info = None if is_folder else _info(uri)
    if info is not None:
        yield from _file_items(info, "named", shared)
    elif is_glob(uri) and not os.path.isdir(local_path(uri) or ""):
        yield from _all_file_items(_glob_files(uri, shared), shared)
    else:
        files = storage.list_files(uri, skip_folder=shared.skip_folder, marker=RESULTS_MARKER)
        yield from _all_file_items(((file, "found") for file in files), shared)


def _glob_files(pattern: str, shared: _Inputs) -> Iterator[tuple[FileInfo, Origin]]:
    for match, named in list_matches(pattern, shared.skip_folder, RESULTS_MARKER):
        # A glob such as `*` is not meant to follow the notes that lie beside the images.
        stray = extension(match.uri) in MANIFEST_NAMES and not pattern.lower().endswith(MANIFEST_NAMES)
        yield match, "named" if named and not stray else "found"


def _info(uri: str) -> FileInfo | None:
    try:
        return storage.info(uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _all_file_items(files: Iterable[tuple[FileInfo | Item, Origin]], shared: _Inputs) -> Iterator[Item]:
    """The items of each file in turn. Remote archives are listed several at a time, each waiting for many answers."""
    pending: deque[tuple[Ahead[Item], Listing]] = deque()
    pool = ThreadPoolExecutor(ARCHIVES_AT_ONCE, thread_name_prefix="list")
    try:
        for file, origin in files:
            if isinstance(file, FileInfo) and _is_archive(file) and not is_local(file.uri):
                own = Listing()  # counted by another thread
                pending.append((Ahead(pool, _file_items(file, origin, shared._replace(listing=own))), own))
                if len(pending) == ARCHIVES_AT_ONCE:
                    yield from _first_items(pending, shared.listing)
                continue
            for item in [file] if isinstance(file, Item) else _file_items(file, origin, shared):
                while pending:
                    yield from _first_items(pending, shared.listing)
                yield item
        while pending:
            yield from _first_items(pending, shared.listing)
    finally:
        for ahead, _ in pending:
            ahead.stop()
        pool.shutdown()


def _first_items(pending: deque[tuple[Ahead[Item], Listing]], listing: Listing) -> Iterator[Item]:
    ahead, own = pending[0]  # stays among the pending ones, to be stopped if its reader gives up
    yield from ahead
    listing.add(own)
    pending.popleft()


def _is_archive(info: FileInfo) -> bool:
    return info.uri.lower().endswith(ARCHIVE_NAMES) and info.version != MISSING_VERSION


def _file_items(info: FileInfo, origin: Origin, shared: _Inputs) -> Iterator[Item]:
    """The items of one file: itself, or what the archive or manifest holds."""
    name = info.uri.lower()
    if _is_archive(info):
        try:
            yield from _archive_items(info, name, origin, shared)
        except ArchiveError as error:
            yield failed_item(info, error)
    elif name.endswith(MANIFEST_NAMES) and origin == "named":
        yield from _manifest_items(info, shared)
    elif name.endswith(MANIFEST_NAMES) and origin == "listed":
        yield failed_item(info, ArchiveError(info.uri, "unsupported", "a manifest named in a manifest"))
    elif origin != "found" or is_image_name(name):
        key = printable(info.uri)
        yield Item(key, info.version, "file", key, "", 0, info.size)
    else:
        shared.listing.skip(name)


def _archive_items(info: FileInfo, name: str, origin: Origin, shared: _Inputs) -> Iterator[Item]:
    match extension(name):
        case ".tar":
            yield from list_tar(info, shared.limits, shared.listing, gzipped=False)
        case ".gz" | ".tgz":
            yield from list_tar(info, shared.limits, shared.listing, gzipped=True)
        case ".zip":
            yield from list_zip(info, shared.limits, shared.listing)
        case _:
            yield from _table_items(info, origin, shared)


def _table_items(info: FileInfo, origin: Origin, shared: _Inputs) -> Iterator[Item]:
    schema = read_schema(info)
    if image_column(schema) is not None:
        yield from list_parquet(info, shared.limits)
    elif origin == "named" and uri_column(schema) is not None:
        yield from _manifest_items(info, shared)
    elif origin == "found":
        shared.listing.skip(info.uri)
    else:
        problem = f"no column of encoded images (nor of URIs) among {', '.join(schema.names)}"
        if origin == "named":
            raise ConfigError(f"{info.uri}: {problem}")
        raise ArchiveError(info.uri, "unsupported", problem)


def _manifest_items(info: FileInfo, shared: _Inputs) -> Iterator[Item]:
    yield from _all_file_items(((entry, "listed") for entry in _manifest_entries(info)), shared)


def _manifest_entries(info: FileInfo) -> Iterator[FileInfo | Item]:
    uris = manifest_uris(info)
    entry = _manifest_entry if is_local(info.uri) else _remote_manifest_entry
    with ThreadPoolExecutor(STAT_THREADS, thread_name_prefix="stat") as pool:
        while chunk := list(islice(uris, STATS_AT_ONCE)):
            yield from (map if all(map(is_local, chunk)) else pool.map)(entry, chunk)


def _remote_manifest_entry(uri: str) -> FileInfo | Item:
    """Whoever may write to a bucket has no say over the files of the machines that read it."""
    if not is_local(uri):
        return _manifest_entry(uri)
    key = printable(public_uri(uri))
    return failed_item(
        FileInfo(key, -1, MISSING_VERSION),
        ArchiveError(key, "unsupported", "a manifest in a store names a file of this machine"),
    )


def _manifest_entry(uri: str) -> FileInfo | Item:
    key = printable(public_uri(uri))
    try:
        return storage.info(uri)
    except IsADirectoryError as error:
        return failed_item(FileInfo(key, -1, MISSING_VERSION), ArchiveError(key, "unsupported", str(error)))
    except OSError as error:
        if error.errno not in storage.ABSENT:
            raise
        return Item(key, MISSING_VERSION, "file", key)

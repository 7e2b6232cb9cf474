"""Bytes at a URI: read, write, list, and create exactly once, on local disks and object stores.

A URI enters (a local path, ``file://``, ``s3://``, ``gs://``, ``az://``, ``memory://``) with bytes; bytes or
``FileInfo`` leave. Local calls bypass fsspec: they run thousands of times per second. Remote calls are retried
here and nowhere else (``retry.py``). Tested against local disks, memory, and servers that speak S3's, Google's and
Azure's protocols on the same machine, never against the clouds themselves.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from pipeline.retry import http_status, mapped_errors, retried, retry_count
from pipeline.uris import is_local, join, local_path, locate, public_uri, resolve, scheme_of

__all__ = [
    "MISSING_VERSION", "FileInfo", "StoreConflict", "create_exclusive", "delete", "exists",
    "honours_create_exclusive", "info", "is_local", "join", "list_files", "public_uri", "read_bytes", "read_range",
    "resolve", "retry_count", "write_bytes",
]  # fmt: skip

ASIDE_PREFIX = ".maskline-tmp-"
"""Local files being written; a listing leaves them out, as also what a killed writer left."""

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What a file system says of a path where there is nothing, and can be nothing."""

MISSING_VERSION = "missing"
"""The version of a file that a link or a manifest names and that is not there."""

_memory_lock = threading.Lock()


class StoreConflict(OSError):  # noqa: N818  the store's own word for its answer 409
    """S3 answered 409: another write to the same key was under way, so whether the key exists now is unknown."""


class FileInfo(NamedTuple):
    """One stored object."""

    uri: str
    size: int
    """Bytes; -1 for a link that leads nowhere."""
    version: str
    """The etag, or size-mtime where there is none. It changes when the content does."""


def read_bytes(uri: str) -> bytes:
    path = local_path(uri)
    if path is None:
        return _read_remote(uri, None, None)
    with open(path, "rb", buffering=0) as file:
        return file.read()


def read_range(uri: str, start: int, length: int) -> bytes:
    """At most ``length`` bytes from ``start``; fewer at the end of the object, none beyond it."""
    if start < 0 or length < 0:
        raise ValueError(f"a range starts at 0 or later and is not negative, got start={start} length={length}")
    path = local_path(uri)
    if path is None:
        return _read_remote(uri, start, start + length) if length else b""
    with open(path, "rb") as file:  # buffered: one read(2) may give less than asked before the end
        file.seek(start)
        return file.read(length)


def exists(uri: str) -> bool:
    """Whether there is an object (or a file; not a folder) at this URI."""
    try:
        info(uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
    return True


def delete(uri: str) -> None:
    """Delete an object; one that is not there is deleted already."""
    path = local_path(uri)
    with suppress(FileNotFoundError):
        if path is None:
            _delete_remote(uri)
        else:
            os.unlink(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Publish a whole object in one step, replacing what was there; a reader sees the old bytes or the new."""
    path = local_path(uri)
    if path is None:
        _write_remote(uri, data)
        return
    aside = _write_aside(path, data)
    try:
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
    _sync_folder(path)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Create an object that must not exist yet, in one attempt of ours.

    True: this call created it. False: it existed. An error (``OSError``, ``TimeoutError``, ``StoreConflict``): the
    outcome is unknown. False may also be our own write whose answer was lost: when a connection breaks, aiohttp
    sends a PUT once more by itself. So on anything but True, read the object and see whose it is.
    Local: a temporary file and ``os.link``. S3 and Azure: one PUT with If-None-Match: *. Google: one POST with
    ifGenerationMatch=0.
    """
    if not data:
        raise ValueError(
            f"create_exclusive needs a body: an empty one cannot be told from a failed write ({public_uri(uri)})"
        )
    path = local_path(uri)
    if path is not None:
        return _link_exclusive(path, data)
    fs, remote_path = locate(uri)
    options: dict[str, Any] = {"chunksize": 2**32} if scheme_of(uri) in ("s3", "gs") else {}  # one request, no parts
    with mapped_errors(uri):
        try:
            if scheme_of(uri) == "memory":
                with _memory_lock:
                    fs.pipe_file(remote_path, data, mode="create")
            else:
                fs.pipe_file(remote_path, data, mode="create", **options)
        except FileExistsError:
            return False
        except Exception as error:
            status = http_status(error)
            if status == 412:
                return False
            if status == 409:
                raise StoreConflict(errno.EBUSY, f"409 while creating: {error}", public_uri(uri)) from error
            raise
    return True


@retried
def honours_create_exclusive(uri_prefix: str) -> bool:
    """Whether the store refuses to create a key twice, tried with a new key under the prefix, on a retry too."""
    probe = join(uri_prefix, f"_probe-{uuid.uuid4().hex}")
    try:
        create_exclusive(probe, b"probe 1")
        return not create_exclusive(probe, b"probe 2")
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):  # a disk without hard links
            return False
        raise
    finally:
        delete(probe)


def info(uri: str) -> FileInfo:
    """Size and version of one object. ``FileNotFoundError`` if there is none, ``IsADirectoryError`` for a folder."""
    path = local_path(uri)
    if path is None:
        return _info_remote(uri)
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", path)
    return FileInfo(os.path.abspath(path), found.st_size, f"{found.st_size}-{found.st_mtime_ns}")


def list_files(
    prefix_uri: str, *, skip_folder: Callable[[str], bool] | None = None, marker: str | None = None
) -> Iterator[FileInfo]:
    """Every object below a folder or prefix, streaming, in the order of their names (as S3 sorts keys).

    ``skip_folder(folder_uri)``: folders that are not entered. ``marker``: a folder holding a file of this name is
    left out; a store that lists keys flat has by then yielded the few keys that sort before the marker.
    """
    from pipeline.file_listing import list_local, list_objects

    path = local_path(prefix_uri)
    if path is not None:
        return list_local(os.path.abspath(path), skip_folder, marker)
    return list_objects(prefix_uri, skip_folder, marker)


# ---------------------------------------------------------------------------------------------------- remote calls


@retried
def _read_remote(uri: str, start: int | None, stop: int | None) -> bytes:
    fs, path = locate(uri)
    # Whole S3 objects: with more than one connection allowed, s3fs asks for the size first, a request we can spare.
    options = {"max_concurrency": 1} if start is None and scheme_of(uri) == "s3" else {}
    try:
        return bytes(fs.cat_file(path, start=start, end=stop, **options))
    except Exception as error:  # of no class that the clients share
        if start is not None and http_status(error) == 416:
            return b""
        raise


@retried
def _write_remote(uri: str, data: bytes) -> None:
    fs, path = locate(uri)
    fs.pipe_file(path, data)


@retried
def _delete_remote(uri: str) -> None:
    fs, path = locate(uri)
    fs.rm_file(path)


@retried
def _info_remote(uri: str) -> FileInfo:
    fs, path = locate(uri)
    found = fs.info(path)
    if found["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, "a folder, not an object", public_uri(uri))
    return FileInfo(public_uri(uri), found["size"], object_version(found))


def object_version(found: Any) -> str:
    """The version of an object as the mapping that its store's listing or answer is describes it."""
    etag = found.get("ETag") or found.get("etag")
    if etag:
        return str(etag).strip('"')
    changed: Any = found.get("LastModified") or found.get("mtime") or found.get("updated") or found.get("created")
    if hasattr(changed, "timestamp"):
        changed = changed.timestamp()
    if isinstance(changed, float):
        changed = int(changed * 1e6)  # µs
    return f"{found['size']}-{changed}"


# ------------------------------------------------------------------------------------------------------- local files


def _write_aside(path: str, data: bytes) -> str:
    """Write and sync a temporary file beside ``path``, so that publishing it is one rename or link."""
    folder = os.path.dirname(path) or "."
    aside = os.path.join(folder, f"{ASIDE_PREFIX}{uuid.uuid4().hex}")
    try:
        file = open(aside, "xb")  # noqa: SIM115  closed below, on both ways in
    except FileNotFoundError:
        os.makedirs(folder, exist_ok=True)
        file = open(aside, "xb")  # noqa: SIM115
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(aside)
        raise
    return aside


def _link_exclusive(path: str, data: bytes) -> bool:
    aside = _write_aside(path, data)
    try:
        os.link(aside, path)  # fails when the name is taken; the content appears whole
    except FileExistsError:
        return False
    finally:
        os.unlink(aside)
    _sync_folder(path)
    return True


def _sync_folder(path: str) -> None:
    """The name itself reaches the disk: a commit that survives a power cut must not name files that did not."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

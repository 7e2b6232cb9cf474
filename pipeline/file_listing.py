"""Listing folders and prefixes as streams of ``FileInfo``, in the order in which S3 sorts keys.

A folder or prefix enters; its files leave, one at a time: memory holds the names of one folder (local) or one
page (object stores), never the whole listing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import fsspec.asyn

from pipeline import storage
from pipeline.retry import retried
from pipeline.storage import ASIDE_PREFIX, MISSING_VERSION, FileInfo
from pipeline.uris import locate, scheme_of

SkipFolder = Callable[[str], bool] | None
Page = tuple[list[tuple[str, int, str]], str | None]
"""Key, size and version of some objects, and what to ask for the next of them with."""


def list_local(root: str, skip_folder: SkipFolder, marker: str | None) -> Iterator[FileInfo]:
    """Depth first. Linked folders are followed, except into a folder they lie in."""
    above: list[tuple[int, int]] = []
    stack: list[tuple[str, Iterator[str]]] = []

    def enter(folder: str) -> None:
        if skip_folder is not None and skip_folder(folder):
            return
        try:
            names, identity = _names(folder), _identity(folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        if identity not in above and marker not in names:
            above.append(identity)
            stack.append((folder if folder.endswith("/") else folder + "/", iter(names)))

    enter(root)
    while stack:
        folder, names = stack[-1]
        for name in names:
            if name.endswith("/"):
                enter(folder + name[:-1])
                break
            found = _local_file(folder + name)
            if found is not None:
                yield found
        else:
            stack.pop()
            above.pop()


def list_objects(prefix_uri: str, skip_folder: SkipFolder, marker: str | None) -> Iterator[FileInfo]:
    if scheme_of(prefix_uri) == "memory":
        return _list_tree(prefix_uri, skip_folder, marker)
    return _list_flat(prefix_uri, skip_folder, marker)


def _names(folder: str) -> list[str]:
    """Names in a folder, those of folders with a slash, which puts them where S3 would sort their content."""
    with os.scandir(folder) as entries:
        names = [entry.name + "/" if _is_folder(entry) else entry.name for entry in entries]
    return sorted(name for name in names if not name.startswith(ASIDE_PREFIX))


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _local_file(path: str) -> FileInfo | None:
    try:
        found = os.stat(path)
    except OSError as error:  # a link to nowhere names an image that is missing; anything else was deleted meanwhile
        if error.errno not in storage.ABSENT:
            raise
        return FileInfo(path, -1, MISSING_VERSION) if os.path.islink(path) else None
    if not stat.S_ISREG(found.st_mode):
        return None
    return FileInfo(path, found.st_size, f"{found.st_size}-{found.st_mtime_ns}")


def _list_flat(prefix_uri: str, skip_folder: SkipFolder, marker: str | None) -> Iterator[FileInfo]:
    """Pages of keys, all below the prefix in one sorted run."""
    fs, path = locate(prefix_uri)
    bucket, key, _ = fs.split_path(path)
    prefix = key.rstrip("/") + "/" if key else ""
    scheme, rest = prefix_uri.split("://", 1)
    root = f"{scheme.lower()}://{rest.removesuffix(key).strip('/')}/"
    skipped = "\0"  # the folder being left out; keys arrive sorted, so one at a time
    folder, token = "", None
    while True:
        page, token = _page(prefix_uri, fs, bucket, prefix, token)
        for name, size, version in page:
            if name.startswith(skipped) or name.endswith("/"):
                continue
            parent, _, base = name.rpartition("/")
            if parent != folder:
                folder = parent
                left_out = _first_skipped(root, prefix, parent, skip_folder)
                if left_out is not None:
                    skipped = left_out
                    continue
            if base == marker:
                skipped = name[: -len(base)] or ""
                continue
            yield FileInfo(root + name, size, version)
        if not token:
            return


def _first_skipped(root: str, prefix: str, parent: str, skip_folder: SkipFolder) -> str | None:
    """The outermost folder between the prefix and a key that is not to be entered."""
    if skip_folder is None:
        return None
    ends = [len(prefix.rstrip("/"))]
    ends += [index for index in range(len(prefix), len(parent)) if parent[index] == "/"] + [len(parent)]
    return next((parent[:end] + "/" for end in ends if end and skip_folder(root + parent[:end])), None)


@retried
def _page(uri: str, fs: Any, bucket: str, prefix: str, token: str | None) -> Page:
    fetch = {"s3": _s3_page, "gs": _google_page, "az": _azure_page}[scheme_of(uri)]
    return fetch(fs, bucket, prefix, token)


def _s3_page(fs: Any, bucket: str, prefix: str, token: str | None) -> Page:
    more = {"ContinuationToken": token} if token else {}
    page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
    entries = [{"size": entry["Size"], **entry} for entry in page.get("Contents", ())]
    files = [(entry["Key"], entry["size"], storage.object_version(entry)) for entry in entries]
    return files, page.get("NextContinuationToken")


def _google_page(fs: Any, bucket: str, prefix: str, token: str | None) -> Page:
    page = fs.call("GET", "b/{}/o", bucket, prefix=prefix, pageToken=token, json_out=True)
    entries = page.get("items", ())
    files = [(entry["name"], int(entry["size"]), storage.object_version(entry)) for entry in entries]
    return files, page.get("nextPageToken")


def _azure_page(fs: Any, container: str, prefix: str, token: str | None) -> Page:
    """An account with a hierarchical namespace lists its folders too, as empty objects with a mark."""

    async def fetch() -> Page:
        client = fs.service_client.get_container_client(container)
        pages = client.list_blobs(name_starts_with=prefix, include=["metadata"], results_per_page=1000).by_page(token)
        blobs = [blob async for blob in await anext(pages)]
        files = [blob for blob in blobs if (blob.metadata or {}).get("hdi_isfolder") != "true"]
        return [(blob.name, blob.size, storage.object_version(blob)) for blob in files], pages.continuation_token

    page: Page = fsspec.asyn.sync(fs.loop, fetch)
    return page


def _list_tree(uri: str, skip_folder: SkipFolder, marker: str | None) -> Iterator[FileInfo]:
    """Memory, folder by folder."""
    if skip_folder is not None and skip_folder(uri.rstrip("/")):
        return
    entries = [(entry["name"].rstrip("/").rpartition("/")[2], entry) for entry in _entries(uri)]
    if any(name == marker for name, _ in entries):
        return
    for _, entry in sorted(entries, key=lambda pair: pair[0] + "/" * (pair[1]["type"] == "directory")):
        child = f"memory://{entry['name'].strip('/')}"
        if entry["type"] == "directory":
            yield from _list_tree(child, skip_folder, marker)
        else:
            yield FileInfo(child, entry["size"], storage.object_version(entry))


@retried
def _entries(uri: str) -> list[dict[str, Any]]:
    fs, path = locate(uri)
    try:
        entries: list[dict[str, Any]] = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/")]

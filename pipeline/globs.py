"""Globs over any store: a listing below the pattern's literal part, filtered as it streams.

A pattern enters; the files that it names leave, and those in folders that it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fsspec.utils import glob_translate

from pipeline.storage import FileInfo, list_files


def is_glob(uri: str) -> bool:
    return re.search(r"[*?\[]", uri) is not None


def list_matches(
    pattern: str, skip_folder: Callable[[str], bool], marker: str | None
) -> Iterator[tuple[FileInfo, bool]]:
    """Each file with whether the pattern names it itself (True), or a folder above it (False)."""
    root = pattern[: re.search(r"[*?\[]", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    depths = _patterns_by_depth(pattern)
    whole = re.compile(glob_translate(pattern))
    first_depth = root.count("/") + 1

    def leads_nowhere(folder: str) -> bool:
        depth = folder.count("/")
        misses = first_depth <= depth < len(depths) and depths[depth].match(folder) is None
        return misses or skip_folder(folder)

    folder, folder_named = "", False
    for info in list_files(root or "/", skip_folder=leads_nowhere, marker=marker):
        parent = info.uri.rpartition("/")[0]
        if parent != folder:
            folder, folder_named = parent, _names_one(whole, parent, first_depth)
        if whole.match(info.uri):
            yield info, True
        elif folder_named:
            yield info, False


def _patterns_by_depth(pattern: str) -> list[re.Pattern[str]]:
    """What a folder with so many slashes in its URI must match to be worth entering, as far as that can be said."""
    parts = pattern.split("/")
    if "**" in parts:
        parts = parts[: parts.index("**")]
    return [re.compile(glob_translate("/".join(parts[: depth + 1]))) for depth in range(len(parts))]


def _names_one(whole: re.Pattern[str], folder: str, first_depth: int) -> bool:
    """Whether the pattern names this folder or one above it."""
    parts = folder.split("/")
    return any(whole.match("/".join(parts[: depth + 1])) for depth in range(first_depth, len(parts)))

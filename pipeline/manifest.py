"""Manifests: lists of URIs in a text file, a CSV or a Parquet column.

A manifest's ``FileInfo`` enters; URIs leave, relative ones resolved against the manifest's folder.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Sequence

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.items import damaged, extension
from pipeline.parquet_archive import PARSE_ERRORS, open_table
from pipeline.range_file import is_damage, open_object
from pipeline.storage import FileInfo
from pipeline.uris import is_local, join

COLUMN_NAMES = ("uri", "url", "path", "image", "image_key", "file_name")
"""The column that holds the URIs, in any case; a CSV without any of these holds them in its first."""

BLOCK_BYTES = 1024 * 1024


def uri_column(schema: pa.Schema) -> str | None:
    """The text column of a Parquet table that holds URIs, None if there is none."""
    text = {
        field.name.lower(): str(field.name)
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type) or pa.types.is_string_view(field.type)
    }
    return next((text[name] for name in COLUMN_NAMES if name in text), None)


def manifest_uris(info: FileInfo) -> Iterator[str]:
    """Every entry, in order, made absolute."""
    folder = info.uri.rpartition("/")[0]
    match extension(info.uri):
        case ".parquet":
            entries = _parquet_entries(info)
        case ".csv":
            entries = _csv_entries(info)
        case _:
            entries = (line for line in _lines(info) if not line.lstrip().startswith("#"))
    for entry in entries:
        stripped = entry.strip()
        if "\0" in stripped:
            raise ConfigError(f"the manifest {info.uri} holds a NUL byte: {stripped[:100]!r}; it has to be text")
        if stripped:
            yield _absolute(stripped, folder)


def _absolute(entry: str, folder: str) -> str:
    if "://" in entry or entry.startswith("/"):
        return entry
    if is_local(folder):
        return join(folder, entry)
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(join(place, entry))}"


def _lines(info: FileInfo) -> Iterator[str]:
    with open_object(info.uri, info.size, BLOCK_BYTES) as file:
        binary = io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file
        with io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield from text


def _csv_entries(info: FileInfo) -> Iterator[str]:
    rows = csv.reader(_lines(info))
    try:
        first = next(rows, [])
        column = _header_column(first)
        if column is None:
            column = 0
            if first and _looks_like_uri(first[0]):
                yield first[0]
        for row in rows:
            if len(row) > column:
                yield row[column]
    except csv.Error as error:
        raise ConfigError(f"cannot read the manifest {info.uri}, line {rows.line_num}: {error}") from error


def _header_column(header: Sequence[str]) -> int | None:
    names = [name.strip().lower() for name in header]
    return next((names.index(name) for name in COLUMN_NAMES if name in names), None)


def _looks_like_uri(cell: str) -> bool:
    """Whether the first cell of a CSV is an entry already, and not the name of the column."""
    return "/" in cell or extension(cell) != ""


def _parquet_entries(info: FileInfo) -> Iterator[str]:
    with open_table(info) as (table, file):
        column = uri_column(table.schema_arrow)
        try:
            for batch in table.iter_batches(columns=[column]):
                yield from (entry for entry in batch.column(0).to_pylist() if entry is not None)
        except PARSE_ERRORS as error:
            if not is_damage(error, file):
                raise
            raise damaged(info, "unreadable", str(error)) from error

"""Encoded images in a Parquet column: Hugging Face's struct{bytes, path}, or plain binary.

A table's ``FileInfo`` enters; one item per row leaves. Items enter; payloads leave.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ArchiveError, DecodeError
from pipeline.items import ArchiveLimits, Item, damaged, printable
from pipeline.range_file import is_damage, open_object
from pipeline.storage import FileInfo

COLUMN_NAMES = ("image", "jpg", "jpeg", "png", "webp", "bytes", "content")
"""Where encoded images are looked for first; else in the only binary column."""

BLOCK_BYTES = 4 * 1024 * 1024
"""Read at a time from a remote table."""

# UnicodeDecodeError, for one, is a ValueError; ArrowException is none of the others.
PARSE_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, OverflowError)

ROWS_AT_ONCE = 32
"""Rows decoded from a column at a time; a row group may be larger than memory."""


def read_schema(info: FileInfo) -> pa.Schema:
    with open_table(info) as (table, _):
        return table.schema_arrow


def image_column(schema: pa.Schema) -> str | None:
    """The path of the column that holds encoded images, None if there is none or no telling which."""
    found = {field.name: path for field in schema if (path := _binary_path(field)) is not None}
    by_name = {name.lower(): path for name, path in reversed(found.items())}
    for name in COLUMN_NAMES:
        if name in by_name:
            return by_name[name]
    return next(iter(found.values())) if len(found) == 1 else None


def list_parquet(info: FileInfo, limits: ArchiveLimits) -> Iterator[Item]:
    """One item per row, from the table's footer alone; how large each image is, only its bytes tell."""
    key = printable(info.uri)
    with open_table(info) as (table, _):
        rows = table.metadata.num_rows
    for row in range(min(rows, limits.max_members)):
        yield Item(f"{key}#{row}", info.version, "parquet", key, "", row, -1)
    if rows > limits.max_members:
        raise damaged(info, "too_large", f"more than {limits.max_members} rows")


def read_parquet(info: FileInfo, items: Sequence[Item], limits: ArchiveLimits) -> Iterator[bytes | DecodeError]:
    """Payloads in the order of ``items``; a row group is read once for each ascending run of its rows."""
    done = 0
    try:
        with open_table(info) as (table, file):
            column = image_column(table.schema_arrow)
            if column is None:
                raise damaged(info, "unreadable", "it has no column of images any more")
            starts = _row_group_starts(table)
            for group, run in _runs([item.offset for item in items], starts):
                for payload in _read_run(
                    info, table, file, column, group, [row - starts[group] for row in run], limits
                ):
                    yield payload
                    done += 1
    except ArchiveError as error:
        for _ in items[done:]:
            yield DecodeError(error.reason, f"{error.uri}: {error.detail}")


@contextmanager
def open_table(info: FileInfo) -> Iterator[tuple[pq.ParquetFile, BinaryIO]]:
    """The table and the file that it is read from. ``ArchiveError`` if it is not Parquet."""
    if info.size == 0:
        raise damaged(info, "empty", "0 bytes")
    with open_object(info.uri, info.size, BLOCK_BYTES) as file:
        try:
            table = pq.ParquetFile(file, buffer_size=1024 * 1024, pre_buffer=False)
            rows = _row_group_starts(table)[-1]
            if rows != table.metadata.num_rows or table.schema_arrow is None:
                raise ValueError(f"its row groups hold {rows} rows, it says {table.metadata.num_rows}")
        except PARSE_ERRORS as error:
            if not is_damage(error, file):
                raise
            file.seek(0)
            if file.read(4) == b"PAR1" and "magic bytes" in str(error):
                raise damaged(info, "truncated", "no Parquet footer at its end") from error
            raise damaged(info, "unreadable", str(error)) from error
        with table:
            yield table, file


def _binary_path(field: pa.Field) -> str | None:
    if _is_binary(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        if index >= 0 and _is_binary(field.type.field(index).type):
            return f"{field.name}.bytes"
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _row_group_starts(table: pq.ParquetFile) -> list[int]:
    """The first row of each row group, and the number of rows."""
    metadata = table.metadata
    return list(accumulate((metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)), initial=0))


def _runs(rows: Sequence[int], starts: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Cut the wanted rows where the row group changes or they do not ascend."""
    groups = [bisect.bisect_right(starts, row) - 1 for row in rows]
    cuts = [index + 1 for index, (a, b) in enumerate(pairwise(rows)) if groups[index] != groups[index + 1] or a >= b]
    for start, stop in pairwise([0, *cuts, len(rows)]):
        yield groups[start], list(rows[start:stop])


def _read_run(
    info: FileInfo,
    table: pq.ParquetFile,
    file: BinaryIO,
    column: str,
    group: int,
    rows: list[int],
    limits: ArchiveLimits,
) -> Iterator[bytes | DecodeError]:
    """Ascending rows of one row group. Damage inside it fails the rest of them, and only them."""
    refusal: DecodeError | None = None
    done = 0
    try:
        refusal = _refusal(info, table, group, limits)
        if refusal is None:
            for cell in _cells(table, column, group, rows):
                if cell is None:
                    yield DecodeError("missing", "no bytes in this row")
                elif len(cell) > limits.max_image_bytes:
                    yield DecodeError("too_large", f"{len(cell)} bytes, more than {limits.max_image_bytes}")
                else:
                    yield cell
                done += 1
    except PARSE_ERRORS as error:
        if not is_damage(error, file):
            raise
        refusal = DecodeError("unreadable", f"row group {group} of {printable(info.uri)}: {error}")
    for _ in rows[done:]:
        yield refusal or DecodeError("unreadable", f"{printable(info.uri)} has fewer rows than it says")


def _refusal(info: FileInfo, table: pq.ParquetFile, group: int, limits: ArchiveLimits) -> DecodeError | None:
    if not 0 <= group < table.metadata.num_row_groups:
        return DecodeError("unreadable", "the table no longer has this row")
    # Of the row group as a whole against the file: asking for one column's sizes ends the process where the footer
    # is damaged (pyarrow 26: an exception of its C++ part that nothing catches).
    unpacked = table.metadata.row_group(group).total_byte_size
    if limits.ratio_exceeded(unpacked, info.size):
        return DecodeError("too_large", f"row group {group} unpacks to {unpacked} bytes, the file has {info.size}")
    return None


def _cells(table: pq.ParquetFile, column: str, group: int, rows: list[int]) -> Iterator[bytes | None]:
    wanted = iter(rows)
    row = next(wanted)
    start = 0
    for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
        cells = batch.column(0)
        if pa.types.is_struct(cells.type):
            cells = cells.flatten()[0]  # a null struct has null bytes
        while row < start + len(cells):
            yield cells[row - start].as_py()
            following = next(wanted, None)
            if following is None:
                return
            row = following
        start += len(cells)

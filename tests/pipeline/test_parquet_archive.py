"""Tables of encoded images: which column, nulls, row groups, damage."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.archive import ArchiveLimits
from pipeline.errors import ConfigError
from pipeline.parquet_archive import image_column
from pipeline.storage import join
from tests.pipeline.archives import IMAGES, listed, payloads, struct_column, table_bytes

HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("image", HF)], "image.bytes"),
        ([("mask", HF), ("image", HF)], "image.bytes"),
        ([("Image", pa.binary())], "Image"),
        ([("content", pa.large_binary()), ("hash", pa.binary())], "content"),
        ([("picture", HF), ("label", pa.int64())], "picture.bytes"),
        ([("thumbnail", pa.binary()), ("x", pa.string())], "thumbnail"),
        ([("a", pa.binary()), ("b", pa.binary())], None),
        ([("image", pa.string()), ("n", pa.int64())], None),
        ([("image", pa.struct([("path", pa.string())]))], None),
        ([("images", pa.list_(HF))], None),
    ],
)
def test_the_column_of_images_is_found_or_not_guessed(fields: list[tuple[str, pa.DataType]], expected: str) -> None:
    assert image_column(pa.schema(fields)) == expected


def test_rows_without_bytes_are_missing(store: str) -> None:
    cells = [b"a", None, b"", b"d"]
    storage.write_bytes(join(store, "binary.parquet"), table_bytes({"image": pa.array(cells, pa.binary())}))
    structs = [
        {"bytes": b"a", "path": "x"},
        None,
        {"bytes": b"", "path": None},
        {"bytes": None, "path": "elsewhere.jpg"},
    ]
    storage.write_bytes(join(store, "struct.parquet"), table_bytes({"image": pa.array(structs, HF)}))
    assert payloads(listed(join(store, "binary.parquet"))) == [b"a", "missing", b"", b"d"]
    assert payloads(listed(join(store, "struct.parquet"))) == [b"a", "missing", b"", "missing"]


def test_rows_are_read_across_row_groups_in_any_order(store: str) -> None:
    cells = [b"%d" % row for row in range(100)]
    storage.write_bytes(join(store, "x.parquet"), table_bytes({"image": struct_column(cells)}, row_group_size=33))
    items = listed(join(store, "x.parquet"))
    for rows in ([0, 32, 33, 65, 66, 98, 99], [99, 0, 50, 49, 50], list(range(40, 70)), [5]):
        assert payloads(items.take(rows)) == [cells[row] for row in rows]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-20], "truncated"),
        (lambda _: b"no table" * 30, "unreadable"),
        (lambda content: content[:-12] + b"\xff" * 4 + content[-8:], "unreadable"),
        (lambda _: b"", "empty"),
    ],
)
def test_what_is_no_parquet_is_one_failed_row(store: str, damage: object, reason: str) -> None:
    assert callable(damage)
    storage.write_bytes(join(store, "x.parquet"), damage(table_bytes({"image": list(IMAGES.values())})))
    items = listed(join(store, "x.parquet"))
    if items["kind"].to_pylist() == ["failed"]:
        assert payloads(items) == [reason]
    else:
        assert len(payloads(items)) == items.num_rows


def test_damage_in_one_row_group_fails_its_rows_only(store: str) -> None:
    cells = [bytes([row]) * 200 for row in range(30)]
    options = {"row_group_size": 10, "compression": "zstd", "use_dictionary": False, "write_page_checksum": False}
    content = bytearray(table_bytes({"image": cells}, **options))
    frames = [at for at in range(len(content)) if content[at : at + 4] == b"\x28\xb5\x2f\xfd"]  # one page per row group
    content[frames[1] : frames[1] + 20] = b"\xff" * 20
    storage.write_bytes(join(store, "x.parquet"), bytes(content))
    assert payloads(listed(join(store, "x.parquet"))) == [*cells[:10], *["unreadable"] * 10, *cells[20:]]


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    cells = [bytes(20 * 1024 * 1024), b"x"]
    (tmp_path / "x.parquet").write_bytes(table_bytes({"image": cells}, compression="zstd", row_group_size=1))
    items = listed(str(tmp_path / "x.parquet"))
    assert payloads(items) == ["too_large", b"x"]
    assert payloads(items, ArchiveLimits(max_compression_ratio=1e6)) == cells


@settings(max_examples=100, deadline=None, derandomize=True)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_flipped_byte_never_escapes_as_an_exception(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    content = bytearray(table_bytes({"image": [bytes([row]) * 20 for row in range(8)]}, row_group_size=4))
    content[place % len(content)] = value
    path = tmp_path_factory.mktemp("flip") / "x.parquet"
    path.write_bytes(content)
    try:
        items = listed(str(path))
    except ConfigError:  # the column has become one of text, or of no image's name
        return
    assert len(payloads(items)) == items.num_rows

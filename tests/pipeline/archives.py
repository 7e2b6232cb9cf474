"""Small archives of every kind, as bytes, from the same twelve images."""

from __future__ import annotations

import csv
import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import storage
from pipeline.archive import ITEM_SCHEMA, ArchiveLimits, Listing, list_images, read_images
from pipeline.errors import DecodeError


def _encoded(index: int) -> bytes:
    picture = Image.new("RGB", (20 + index, 16), (20 * index, 90, 255 - 20 * index))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if index % 2 else "PNG")
    return buffer.getvalue()


IMAGES = {f"{index // 4}/{index:02d}.{'jpg' if index % 2 else 'png'}": _encoded(index) for index in range(12)}
"""Member names in order, and their bytes."""

NOTES = {"0/00.json": b"{}", "0/00.cls": b"7", "README": b"not an image"}


def tar_bytes(members: Mapping[str, bytes] | Iterable[tuple[str, bytes]] = IMAGES, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items() if isinstance(members, Mapping) else members:
            add_member(tar, name, content)
    return buffer.getvalue()


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def zip_bytes(members: Mapping[str, bytes] = IMAGES, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def table_bytes(columns: Mapping[str, object], **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer, **options)
    return buffer.getvalue()


def struct_column(payloads: Iterable[bytes | None]) -> pa.Array:
    """The shape in which Hugging Face stores images."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": payload, "path": f"{row}.jpg"} for row, payload in enumerate(payloads)], kind)


def csv_bytes(rows: Iterable[Iterable[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def write_store(root: str) -> dict[str, str]:
    """Every kind of input below ``root``, by its name; each holds ``IMAGES`` in order."""
    for name, content in {**IMAGES, **NOTES}.items():
        storage.write_bytes(storage.join(root, "loose", name), content)
    loose = [f"loose/{name}" for name in IMAGES]
    mixed = {**NOTES, **IMAGES}
    files = {
        "a.tar": tar_bytes(mixed),
        "a.tar.gz": tar_bytes(mixed, "w:gz"),
        "a.TGZ": tar_bytes(mixed, "w:gz"),
        "a.zip": zip_bytes(mixed),
        "stored.zip": zip_bytes(mixed, zipfile.ZIP_STORED),
        "struct.parquet": table_bytes({"label": range(12), "image": struct_column(IMAGES.values())}, row_group_size=5),
        "binary.parquet": table_bytes({"label": range(12), "jpg": list(IMAGES.values())}, row_group_size=7),
        "large.parquet": table_bytes({"x": pa.array(list(IMAGES.values()), pa.large_binary())}),
        "m.txt": ("# a comment\n\n" + "\n".join(loose) + "\n").encode(),
        "m.csv": csv_bytes([["label", "Path"], *([str(row), entry] for row, entry in enumerate(loose))]),
        "m.parquet": table_bytes({"label": range(12), "uri": [storage.join(root, entry) for entry in loose]}),
    }
    for name, content in files.items():
        storage.write_bytes(storage.join(root, name), content)
    return {name: storage.join(root, name) for name in ["loose", "loose/*/*.[jp][pn]g", "loose/[0-9]", *files]}


def listed(*inputs: str, listing: Listing | None = None, **options: object) -> pa.Table:
    return pa.Table.from_batches(list_images(inputs, listing=listing, **options), ITEM_SCHEMA)  # type: ignore[arg-type]


def payloads(items: pa.Table, limits: ArchiveLimits | None = None, threads: int = 4) -> list[bytes | str]:
    """What is read, with the reason in place of an error; in the order of ``items``."""
    read = list(read_images(items, limits=limits or ArchiveLimits(), threads=threads))
    assert [index for index, _ in read] == list(range(items.num_rows))
    return [payload.reason if isinstance(payload, DecodeError) else payload for _, payload in read]

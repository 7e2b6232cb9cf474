"""What is made to harm: each becomes rows or a clear error, in bounded memory, and nothing is fetched or extracted.

More of it, by format: damage and bombs in test_tar_archive, test_zip_archive, test_parquet_archive and test_decode;
credentials and chained URIs in test_storage; decoders that die or hang in test_isolated_decoder and test_schedule.
"""

from __future__ import annotations

import io
import struct
import tarfile
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import decode, storage
from pipeline.archive import ArchiveLimits, list_images, read_images
from pipeline.decode import DecodeLimits
from pipeline.errors import ConfigError, DecodeError
from pipeline.storage import join
from tests.pipeline.archives import IMAGES, listed, struct_column, table_bytes, tar_bytes

LIMITS = DecodeLimits(max_image_pixels=1_000_000)


def outcomes(uri: str) -> list[str]:
    """Of every image, `ok` or the reason why not."""
    found: list[str] = []
    for _, data in read_images(listed(uri), limits=ArchiveLimits(), threads=2):
        try:
            if isinstance(data, DecodeError):
                raise data
            decode.decode(data, decode.inspect(data, LIMITS))
        except DecodeError as error:
            found.append(error.reason)
        else:
            found.append("ok")
    return found


def png_bomb(side: int) -> bytes:
    """A few kilobytes that are `side` squared black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_an_image_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_bomb(20_000))
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    tracemalloc.start()
    assert outcomes(str(tmp_path)) == ["too_large"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_sparse_members_are_left_out_and_cost_no_memory(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("hole.jpg")
    sparse.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.size": str(2**40),
        "GNU.sparse.map": f"0,3,{2**40 - 3},3",
        "GNU.sparse.name": "hole.jpg",
    }
    sparse.size = 6
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(b"abcdef"))
        for name, data in list(IMAGES.items())[:2]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for name in ("x.tar", "x.tgz"):
        data = buffer.getvalue()
        (tmp_path / name).write_bytes(data if name == "x.tar" else _gzipped(data))
        tracemalloc.start()
        found = outcomes(str(tmp_path / name))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == ["ok", "ok"]
        assert peak < 20_000_000


def _gzipped(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def test_very_many_members_are_listed_in_bounded_memory(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("0000000.jpg").tobuf(tarfile.USTAR_FORMAT))
    with (tmp_path / "many.tar").open("wb") as file:
        for index in range(50_000):
            header[0:7] = b"%07d" % index
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header)
        file.write(bytes(1024))
    tracemalloc.start()
    rows = sum(batch.num_rows for batch in list_images([str(tmp_path / "many.tar")]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 50_000
    assert peak < 32 * 1024**2  # the rows of a batch, and none of the headers


@pytest.mark.parametrize(
    "column",
    [
        pa.array([{"bytes": 1, "path": "x"}] * 3),
        pa.array([[b"a"], [b"b"], []]),
        pa.array([b"123"] * 3, pa.binary(3)),
        pa.array([1.5, 2.5, None]),
    ],
    ids=["struct of numbers", "list of bytes", "bytes of one length", "numbers"],
)
def test_columns_of_wrong_types_are_named(column: pa.Array, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(table_bytes({"image": column}))
    with pytest.raises(ConfigError, match=r"no column of encoded images \(nor of URIs\) among image"):
        outcomes(str(tmp_path / "x.parquet"))


def test_a_footer_that_lies_is_one_row(tmp_path: Path) -> None:
    whole = table_bytes({"image": struct_column(IMAGES.values())})
    for length in (2**31 - 1, 0, len(whole)):
        (tmp_path / "x.parquet").write_bytes(whole[:-8] + struct.pack("<I", length) + b"PAR1")
        (tmp_path / "y.jpg").write_bytes(IMAGES["0/01.jpg"])
        assert Counter(outcomes(str(tmp_path)))["ok"] == 1
        assert len(outcomes(str(tmp_path))) == 2


@pytest.mark.parametrize("entry", ["/etc/passwd", "file:///etc/passwd", "local:///etc/passwd", "FILE:///etc/passwd"])
def test_a_manifest_in_a_store_names_no_file_of_this_machine(entry: str, s3_root: str) -> None:
    storage.write_bytes(join(s3_root, "a.jpg"), IMAGES["0/01.jpg"])
    storage.write_bytes(join(s3_root, "m.txt"), f"a.jpg\n{entry}\n".encode())
    assert outcomes(join(s3_root, "m.txt")) == ["ok", "unsupported"]


@pytest.mark.parametrize(
    "entry",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/x.jpg",
        "ftp://host/x.jpg",
        "simplecache::s3://bucket/x.jpg",
        "zip://x.jpg::s3://bucket/x.zip",
        "s3://key:secret@bucket/x.jpg",
    ],
)
def test_what_no_store_holds_is_never_fetched(entry: str, tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text(f"{entry}\n")
    with pytest.raises(ConfigError) as caught:
        outcomes(str(tmp_path / "m.txt"))
    assert "secret" not in str(caught.value)


def test_members_never_leave_their_archive(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["../out.jpg", "/etc/out.jpg", "a/../../out.jpg", "C:\\out.jpg"]
    (folder / "x.tar").write_bytes(tar_bytes([(name, IMAGES["0/01.jpg"]) for name in names]))
    assert outcomes(str(folder / "x.tar")) == ["ok"] * 4
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]

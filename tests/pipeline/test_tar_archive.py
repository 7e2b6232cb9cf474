"""Tars as they come: damaged, cut, with links, long names, duplicates, and bombs."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.archive import ArchiveLimits, Listing, list_images
from pipeline.errors import ConfigError
from pipeline.storage import join
from tests.pipeline.archives import IMAGES, NOTES, add_member, listed, payloads, tar_bytes
from tests.pipeline.s3_server import FaultyProxy

MEMBERS = [(f"{index}.jpg", bytes([index]) * (300 + 411 * index)) for index in range(4)]


def ends(tar: bytes) -> list[int]:
    """Where the data of each member ends."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return [member.offset_data + member.size for member in archive.getmembers()]


def members_and_error(uri: str) -> tuple[list[bytes | str], str | None]:
    """Payloads listed, and the error of the one row that stands for the damage; checks that they are told apart."""
    items = listed(uri)
    kinds = items["kind"].to_pylist()
    assert "failed" not in kinds[:-1]
    read = payloads(items)
    if kinds[-1] != "failed":
        return read, None
    assert items["image_key"][-1].as_py() == uri
    error = str(items["error"][-1].as_py())
    assert read[-1] == error.partition(":")[0]
    return read[:-1], error


@pytest.mark.parametrize("cut_in", ["data", "padding", "header", "before the end mark"])
def test_a_cut_tar_gives_the_members_before_the_cut(store: str, cut_in: str) -> None:
    tar = tar_bytes(MEMBERS)
    third = ends(tar)[2]
    cut = {"data": third - 1, "padding": third, "header": ends(tar)[3] - 1700, "before the end mark": 512 * 12}[cut_in]
    if cut_in == "before the end mark":
        cut = -(-ends(tar)[3] // 512) * 512
    storage.write_bytes(join(store, "x.tar"), tar[:cut])
    read, error = members_and_error(join(store, "x.tar"))
    whole = sum(end <= cut for end in ends(tar))
    assert read == [data for _, data in MEMBERS[:whole]]
    assert error is not None
    assert error.startswith("truncated: ")


def test_a_cut_tar_gz_gives_the_members_before_the_cut(store: str) -> None:
    noise = [(f"{index}.jpg", random.Random(index).randbytes(3000)) for index in range(8)]
    packed = tar_bytes(noise, "w:gz")
    storage.write_bytes(join(store, "x.tar.gz"), packed[: len(packed) // 2])
    read, error = members_and_error(join(store, "x.tar.gz"))
    assert 2 <= len(read) <= 4  # about half
    assert read == [data for _, data in noise[: len(read)]]
    assert error is not None
    assert error.startswith("truncated: ")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cut=st.integers(0, len(tar_bytes(MEMBERS)) - 1), gzipped=st.booleans())
def test_wherever_a_tar_is_cut_nothing_is_lost_silently(
    tmp_path_factory: pytest.TempPathFactory, cut: int, gzipped: bool
) -> None:
    tar = tar_bytes(MEMBERS)
    path = tmp_path_factory.mktemp("cut") / ("x.tar.gz" if gzipped else "x.tar")
    path.write_bytes(gzip.compress(tar[:cut], 1) if gzipped else tar[:cut])
    read, error = members_and_error(str(path))
    whole = [data for (_, data), end in zip(MEMBERS, ends(tar), strict=True) if end <= cut]
    assert read == whole
    end_mark = -(-ends(tar)[3] // 512) * 512
    assert (error is None) == (cut >= end_mark + 512)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(place=st.integers(0, len(tar_bytes(MEMBERS)) - 1), value=st.integers(0, 255), gzipped=st.booleans())
def test_a_flipped_byte_never_escapes_as_an_exception(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, gzipped: bool
) -> None:
    damaged = bytearray(tar_bytes(MEMBERS, "w:gz" if gzipped else "w"))
    damaged[place % len(damaged)] = value
    path = tmp_path_factory.mktemp("flip") / ("x.tgz" if gzipped else "x.tar")
    path.write_bytes(damaged)
    try:
        items = listed(str(path))
    except ConfigError:  # the flip turned the whole into an empty tar
        return
    assert len(payloads(items)) == items.num_rows


def test_a_damaged_header_in_the_middle_is_not_the_end(store: str) -> None:
    tar = bytearray(tar_bytes(MEMBERS))
    third_header = -(-ends(bytes(tar))[1] // 512) * 512
    tar[third_header + 10] ^= 0xFF
    for name, content in (("x.tar", bytes(tar)), ("x.tgz", gzip.compress(bytes(tar)))):
        storage.write_bytes(join(store, name), content)
        read, error = members_and_error(join(store, name))
        assert read == [data for _, data in MEMBERS[:2]]
        assert error is not None
        assert error.startswith("unreadable: damaged header")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.floats(0, 0.999))
def test_wherever_a_tar_gz_is_cut_whole_members_are_read(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    noise = [(f"{index}.jpg", random.Random(index).randbytes(900)) for index in range(6)]
    tar = tar_bytes(noise)
    packed = gzip.compress(tar)[: int(share * len(gzip.compress(tar)))]
    path = tmp_path_factory.mktemp("cut") / "x.tgz"
    path.write_bytes(packed)
    read, error = members_and_error(str(path))
    unpacked = len(zlib.decompressobj(wbits=31).decompress(packed)) if packed else 0
    assert read == [data for (_, data), end in zip(noise, ends(tar), strict=True) if end <= unpacked]
    end_mark = -(-ends(tar)[-1] // 512) * 512
    assert (error is None) == (unpacked >= end_mark + 512)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"not a tar" * 100, "unreadable"), (b"\x1f\x8b" + b"\0" * 90, "unreadable")],
)
def test_what_is_no_tar_is_one_failed_row(store: str, content: bytes, reason: str) -> None:
    for name in ("x.tar", "x.tar.gz"):
        storage.write_bytes(join(store, name), content)
        read, error = members_and_error(join(store, name))
        assert read == []
        assert error is not None
        assert error.partition(":")[0] in (reason, "truncated" if content[:1] == b"\x1f" else reason)


def test_an_empty_tar_is_no_damage_but_no_input_either(store: str) -> None:
    storage.write_bytes(join(store, "x.tar"), tar_bytes([]))
    storage.write_bytes(join(store, "y.tar.gz"), tar_bytes([], "w:gz"))
    storage.write_bytes(join(store, "z.jpg"), b"z")
    listing = Listing()
    assert payloads(listed(store, listing=listing)) == [b"z"]
    assert listing.failed_archives == 0
    with pytest.raises(ConfigError, match="no images at"):
        listed(join(store, "x.tar"))


def test_a_failed_archive_does_not_hide_the_next(store: str) -> None:
    storage.write_bytes(join(store, "a.tar"), tar_bytes(MEMBERS)[:700])
    storage.write_bytes(join(store, "b.tar"), tar_bytes(MEMBERS))
    listing = Listing()
    assert payloads(listed(store, listing=listing)) == ["truncated", *(data for _, data in MEMBERS)]
    assert (listing.images, listing.failed_archives) == (4, 1)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_only_regular_members_are_images(store: str, mode: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        add_member(tar, "a.jpg", b"a")
        for name, kind in {
            "link.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "folder.jpg": tarfile.DIRTYPE,
            "fifo.jpg": tarfile.FIFOTYPE,
            "device.jpg": tarfile.CHRTYPE,
        }.items():
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "a.jpg"
            tar.addfile(header)
        add_member(tar, "a.json", b"{}")
        add_member(tar, "z.PNG", b"z")
    storage.write_bytes(join(store, "x.tar" if mode == "w" else "x.tgz"), buffer.getvalue())
    listing = Listing()
    assert payloads(listed(store, listing=listing)) == [b"a", b"z"]
    assert listing.skipped == {"link": 2, ".jpg": 2, ".json": 1}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_may_be_long_absolute_upward_and_any_bytes(store: str, mode: str, form: int) -> None:
    names = ["d/" * 200 + "long.jpg", "/etc/absolute.jpg", "../../up.jpg", "ü 你.jpg", "\udcff\udcfe.jpg", "a#b.jpg"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form, errors="surrogateescape") as tar:  # type: ignore[call-overload]
        for name in names:
            add_member(tar, name, name.encode(errors="surrogateescape"))
    uri = join(store, "x.tar" if mode == "w" else "x.tar.gz")
    storage.write_bytes(uri, buffer.getvalue())
    items = listed(uri)
    assert payloads(items) == [name.encode(errors="surrogateescape") for name in names]
    found = items["member"].to_pylist()
    assert [found[0], found[3], found[5]] == [names[0], names[3], names[5]]
    assert found[1] in ("/etc/absolute.jpg", "etc/absolute.jpg")
    assert items["image_key"].to_pylist() == [f"{uri}#{name}" for name in found]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_member_twice_gives_two_items_with_their_own_bytes(store: str, mode: str) -> None:
    uri = join(store, "x.tar" if mode == "w" else "x.tgz")
    storage.write_bytes(uri, tar_bytes([("a.jpg", b"first"), ("b.jpg", b"b"), ("a.jpg", b"second")], mode))
    items = listed(uri)
    assert items["member"].to_pylist() == ["a.jpg", "b.jpg", "a.jpg"]
    assert payloads(items) == [b"first", b"b", b"second"]
    assert payloads(items.slice(2)) == [b"second"]


def test_gzip_members_one_after_another_are_one_stream(store: str) -> None:
    tar = tar_bytes(MEMBERS)
    storage.write_bytes(join(store, "x.tgz"), gzip.compress(tar[:1000]) + gzip.compress(tar[1000:]))
    assert payloads(listed(join(store, "x.tgz"))) == [data for _, data in MEMBERS]


def test_a_gzip_bomb_is_refused_early(tmp_path: Path) -> None:
    header = tarfile.TarInfo("bomb.bin")
    header.size = 400 * 1024 * 1024
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as stream:
        stream.write(tar_bytes(MEMBERS)[: -10 * 1024] + header.tobuf())
        zeros = bytes(1024 * 1024)
        for _ in range(64):
            stream.write(zeros)
    (tmp_path / "bomb.tgz").write_bytes(packed.getvalue())
    tracemalloc.start()
    read, error = members_and_error(str(tmp_path / "bomb.tgz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error is not None
    assert error.startswith("too_large: ")
    assert int(error.split()[1]) < 17 * 1024 * 1024  # it stopped as soon as the ratio was judged
    assert peak < 8 * 1024 * 1024
    assert read[: len(MEMBERS)] == [data for _, data in MEMBERS][: len(read)]


def test_headers_of_absurd_sizes_are_damage(tmp_path: Path) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 8 * 1024 * 1024
        tar = header.tobuf() + bytes(8 * 1024 * 1024) + tar_bytes(MEMBERS)
        (tmp_path / "x.tar").write_bytes(tar)
        assert members_and_error(str(tmp_path / "x.tar")) == (
            [],
            "unreadable: damaged header: 8388608 bytes of name or attributes",
        )


def test_sizes_below_zero_are_damage(tmp_path: Path) -> None:
    pax = tarfile.TarInfo("bad.jpg")
    pax.pax_headers = {"size": "-5120"}
    tar = tar_bytes(MEMBERS[:1])[:1024] + pax.tobuf(tarfile.PAX_FORMAT) + tar_bytes(MEMBERS[1:])
    (tmp_path / "x.tar").write_bytes(tar)
    read, error = members_and_error(str(tmp_path / "x.tar"))
    assert read == [MEMBERS[0][1]]
    assert error is not None
    assert error.startswith("unreadable: ")


def test_listing_a_remote_tar_reads_its_headers_only(s3_root: str, faulty_s3: FaultyProxy) -> None:
    images = [(f"{index}.jpg", bytes([index]) * 400_000) for index in range(6)]
    storage.write_bytes(join(s3_root, "x.tar"), tar_bytes(images))
    faulty_s3.bytes_served = 0
    items = listed(join(s3_root, "x.tar"))
    assert items.num_rows == 6
    assert faulty_s3.bytes_served < 300_000  # of 2.4 MB
    faulty_s3.bytes_served = 0
    faulty_s3.requests.clear()
    assert payloads(items.slice(4, 1)) == [images[4][1]]
    assert faulty_s3.bytes_served < 410_000  # from its place, not from the start
    assert len(faulty_s3.requests) <= 3


def test_remote_archives_listed_together_keep_their_order(s3_root: str) -> None:
    expected, listing = [], Listing()
    for index in range(40):
        if index % 13 == 5:
            storage.write_bytes(join(s3_root, f"{index:02d}.jpg"), b"x")
            expected.append(f"{index:02d}.jpg")
        else:
            members = {f"{member}.jpg": b"x" for member in range(index % 4)} | {"note.txt": b""}
            storage.write_bytes(join(s3_root, f"{index:02d}.tar"), tar_bytes(members)[: -1 if index % 7 else 500])
            expected += [f"{index:02d}.tar#{member}.jpg" for member in range(index % 4 if index % 7 else 0)]
            expected += [] if index % 7 else [f"{index:02d}.tar"]
    items = listed(s3_root, listing=listing)
    assert [key.removeprefix(s3_root + "/") for key in items["image_key"].to_pylist()] == expected
    assert listing.images == sum(kind != "failed" for kind in items["kind"].to_pylist())
    assert listing.failed_archives == sum(kind == "failed" for kind in items["kind"].to_pylist()) == 6


def test_neighbouring_members_of_a_remote_tar_are_one_read(s3_root: str, faulty_s3: FaultyProxy) -> None:
    storage.write_bytes(join(s3_root, "x.tar"), tar_bytes({**NOTES, **IMAGES}))
    items = listed(join(s3_root, "x.tar"))
    faulty_s3.requests.clear()
    assert payloads(items) == list(IMAGES.values())
    assert [method for method, _ in faulty_s3.requests] == ["HEAD", "GET"]


def test_listing_keeps_no_header(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes((f"{index}.txt", b"") for index in range(6_000)))
    with (tmp_path / "y.tar").open("wb") as file:
        file.write(tar_bytes({"y.jpg": b"y"}))
    tracemalloc.start()
    assert sum(batch.num_rows for batch in list_images([str(tmp_path)], limits=ArchiveLimits())) == 1
    assert tracemalloc.get_traced_memory()[1] < 2 * 1024 * 1024  # 6,000 kept headers are above 4 MB
    tracemalloc.stop()

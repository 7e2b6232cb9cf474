"""Zips as they come: cut, corrupt in one member, encrypted, with links and bombs."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.archive import ArchiveLimits, Listing
from pipeline.errors import ConfigError
from pipeline.storage import join
from tests.pipeline.archives import IMAGES, listed, payloads, zip_bytes
from tests.pipeline.s3_server import FaultyProxy

MEMBERS = {f"{index}.jpg": bytes([index + 65]) * (40 + index) for index in range(4)}


def entry(content: bytes, name: str) -> zipfile.ZipInfo:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.getinfo(name)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda content: content[:-30], "truncated: no central directory"),
        (lambda content: content[: len(content) // 3], "truncated: no central directory"),
        (lambda _: b"not a zip" * 50, "unreadable: "),
        (lambda _: b"", "empty: "),
    ],
)
def test_a_zip_without_its_directory_is_one_failed_row(store: str, damage: object, error: str) -> None:
    assert callable(damage)
    storage.write_bytes(join(store, "x.zip"), damage(zip_bytes()))
    items = listed(join(store, "x.zip"))
    assert items["kind"].to_pylist() == ["failed"]
    assert items["image_key"].to_pylist() == [join(store, "x.zip")]
    assert str(items["error"][0]).startswith(error)
    assert payloads(items) == [error.partition(":")[0]]


def test_a_damaged_directory_is_one_failed_row(store: str) -> None:
    content = bytearray(zip_bytes())
    content[content.index(b"PK\1\2")] = 0
    storage.write_bytes(join(store, "x.zip"), bytes(content))
    items = listed(join(store, "x.zip"))
    assert items["kind"].to_pylist() == ["failed"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_in_one_member_fails_that_member(store: str, method: int) -> None:
    content = bytearray(zip_bytes(IMAGES, method))
    names = list(IMAGES)
    third = entry(bytes(content), names[2])
    content[third.header_offset + 30 + len(names[2]) + third.compress_size // 2] ^= 0xFF
    storage.write_bytes(join(store, "x.zip"), bytes(content))
    expected: list[bytes | str] = list(IMAGES.values())
    expected[2] = "unreadable"
    assert payloads(listed(join(store, "x.zip"))) == expected


def test_encrypted_and_exotic_members_are_unsupported(store: str) -> None:
    content = bytearray(zip_bytes(MEMBERS, zipfile.ZIP_BZIP2))
    storage.write_bytes(join(store, "bz2.zip"), bytes(content))
    assert payloads(listed(join(store, "bz2.zip"))) == ["unsupported"] * 4
    content = bytearray(zip_bytes(MEMBERS))
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = content.index(mark)
        content[start + at] |= 1
    storage.write_bytes(join(store, "secret.zip"), bytes(content))
    assert payloads(listed(join(store, "secret.zip"))) == ["unsupported", *list(MEMBERS.values())[1:]]


def test_folders_links_and_other_files_are_left_out(store: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("folder.jpg/", b"")
        archive.writestr("folder.jpg/a.jpg", b"a")
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, b"a.jpg")
        archive.writestr("__MACOSX/._a.jpg", b"attributes")
        archive.writestr("a.xml", b"<a/>")
        archive.writestr("../up.jpg", b"up")
    storage.write_bytes(join(store, "x.zip"), buffer.getvalue())
    listing = Listing()
    items = listed(join(store, "x.zip"), listing=listing)
    assert items["member"].to_pylist() == ["folder.jpg/a.jpg", "../up.jpg"]
    assert payloads(items) == [b"a", b"up"]
    assert listing.skipped == {"link": 1, ".jpg": 1, ".xml": 1}


def test_a_member_twice_gives_two_items_with_their_own_bytes(store: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.jpg", b"second")
    storage.write_bytes(join(store, "x.zip"), buffer.getvalue())
    assert payloads(listed(join(store, "x.zip"))) == [b"first", b"second"]


def test_an_empty_zip_holds_no_images(store: str) -> None:
    storage.write_bytes(join(store, "x.zip"), zip_bytes({}))
    with pytest.raises(ConfigError, match="no images at"):
        listed(join(store, "x.zip"))


def test_bombs_are_refused_by_size_and_by_ratio(tmp_path: Path) -> None:
    members = {"bomb.png": bytes(20 * 1024 * 1024), "small.png": bytes(1024 * 1024), "a.jpg": b"a"}
    (tmp_path / "x.zip").write_bytes(zip_bytes(members))
    items = listed(str(tmp_path / "x.zip"))
    assert payloads(items) == ["too_large", members["small.png"], b"a"]
    assert payloads(items, ArchiveLimits(max_compression_ratio=2000))[0] == members["bomb.png"]
    assert payloads(items, ArchiveLimits(max_image_bytes=10)) == ["too_large", "too_large", b"a"]


def test_a_member_that_understates_its_size_is_unreadable(tmp_path: Path) -> None:
    content = bytearray(zip_bytes({"a.jpg": b"x" * 5000}))
    start = content.index(b"PK\1\2")
    struct.pack_into("<L", content, start + 24, 10)
    (tmp_path / "x.zip").write_bytes(bytes(content))
    assert payloads(listed(str(tmp_path / "x.zip"))) == ["unreadable"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(place=st.integers(0, len(zip_bytes(MEMBERS)) - 1), value=st.integers(0, 255))
def test_a_flipped_byte_never_escapes_as_an_exception(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    content = bytearray(zip_bytes(MEMBERS))
    content[place] = value
    path = tmp_path_factory.mktemp("flip") / "x.zip"
    path.write_bytes(content)
    try:
        items = listed(str(path))
    except ConfigError:  # no member has an image's name any more
        return
    assert len(payloads(items)) == items.num_rows


def test_a_remote_zip_is_read_in_few_requests(s3_root: str, faulty_s3: FaultyProxy) -> None:
    images = {f"{index}.jpg": bytes([index]) * 400_000 for index in range(6)}
    storage.write_bytes(join(s3_root, "x.zip"), zip_bytes(images, zipfile.ZIP_STORED))
    faulty_s3.bytes_served = 0
    items = listed(join(s3_root, "x.zip"))
    assert faulty_s3.bytes_served < 400_000  # the directory, not the images
    faulty_s3.requests.clear()
    assert payloads(items) == list(images.values())
    assert len(faulty_s3.requests) <= 6
    faulty_s3.bytes_served = 0
    assert payloads(items.slice(3, 1)) == [images["3.jpg"]]
    assert faulty_s3.bytes_served < 900_000

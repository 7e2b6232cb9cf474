from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.image_cache import ImageCache
from pipeline.storage import join

ROOT = Path(__file__).parents[2]
SIZE = 100  # bytes of an object

CountedReads = list[str]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> CountedReads:
    """The URIs read from any store, in order."""
    read, seen = storage.read_bytes, []

    def counted(uri: str) -> bytes:
        seen.append(uri)
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", counted)
    return seen


@pytest.fixture
def put(memory_root: str) -> Callable[[int], str]:
    """Stores object number n; its URI."""

    def write(number: int) -> str:
        uri = join(memory_root, f"{number}.jpg")
        storage.write_bytes(uri, bytes([number % 256]) * SIZE)
        return uri

    return write


def kept_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def kept(folder: Path) -> list[int]:
    """The numbers of the objects in the cache."""
    return sorted(path.read_bytes()[0] for path in folder.iterdir())


def test_an_object_is_read_from_its_store_once(tmp_path: Path, put: Callable[[int], str], reads: CountedReads) -> None:
    cache = ImageCache(str(tmp_path / "cache"), 10_000)
    uris = [put(number) for number in range(3)]
    for _ in range(4):
        assert [cache.read(uri) for uri in uris] == [bytes([number]) * SIZE for number in range(3)]
    assert reads == uris


def test_an_object_that_is_gone_is_still_in_the_cache(tmp_path: Path, put: Callable[[int], str]) -> None:
    uri = put(7)
    ImageCache(str(tmp_path), 10_000).read(uri)
    storage.delete(uri)
    assert ImageCache(str(tmp_path), 10_000).read(uri) == bytes([7]) * SIZE


def test_an_object_that_is_not_there_is_a_file_not_found(tmp_path: Path, memory_root: str) -> None:
    cache = ImageCache(str(tmp_path / "cache"), 10_000)
    for uri in (join(memory_root, "none.jpg"), str(tmp_path / "none.jpg")):
        with pytest.raises(FileNotFoundError) as caught:
            cache.read(uri)
        assert caught.value.errno in storage.ABSENT
    assert not (tmp_path / "cache").exists()


def test_local_files_are_read_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "1.jpg"
    path.write_bytes(b"one")
    cache = ImageCache(str(tmp_path / "cache"), 10_000)
    assert cache.read(str(path)) == cache.read(f"file://{path}") == b"one"
    path.write_bytes(b"another")
    assert cache.read(str(path)) == b"another"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("bound", [0, 99, 100, 1_000, 3_333])
def test_the_bound_holds_after_every_read(tmp_path: Path, put: Callable[[int], str], bound: int) -> None:
    """By one process, which may write a sixteenth of the bound and one object before it looks."""
    cache = ImageCache(str(tmp_path), bound)
    most = 0
    for number in range(80):
        assert cache.read(put(number)) == bytes([number]) * SIZE
        most = max(most, kept_bytes(tmp_path))
        assert most <= bound
    assert most >= min(bound // SIZE, max(0, bound * 15 // 16 // SIZE - 1)) * SIZE  # and it is made use of


def test_the_least_recently_used_go_first(tmp_path: Path, put: Callable[[int], str]) -> None:
    """1,000 bytes hold nine objects and a sixteenth of room."""
    cache = ImageCache(str(tmp_path), 1_000)
    uris = [put(number) for number in range(12)]
    for number, left in [
        *((number, list(range(number + 1))) for number in range(9)),
        *((number, list(range(9))) for number in (0, 2)),
        (9, [0, 2, 3, 4, 5, 6, 7, 8, 9]),
        (10, [0, 2, 4, 5, 6, 7, 8, 9, 10]),
        (4, [0, 2, 4, 5, 6, 7, 8, 9, 10]),
        (11, [0, 2, 4, 6, 7, 8, 9, 10, 11]),
    ]:
        cache.read(uris[number])
        assert kept(tmp_path) == left, number
        time.sleep(0.02)  # the clock of a file system is coarse


def test_an_object_larger_than_the_bound_is_read_and_drives_nothing_out(
    tmp_path: Path, put: Callable[[int], str], memory_root: str, reads: CountedReads
) -> None:
    cache = ImageCache(str(tmp_path), 500)
    small, large = put(1), join(memory_root, "large")
    storage.write_bytes(large, bytes(501))
    for _ in range(2):
        cache.read(small)
        assert cache.read(large) == bytes(501)
    assert reads == [small, large, large]
    assert kept(tmp_path) == [1]


@pytest.mark.parametrize("where", ["below a file", "a file"])
def test_a_folder_that_cannot_be_written_costs_nothing_but_speed(
    tmp_path: Path, put: Callable[[int], str], reads: CountedReads, where: str
) -> None:
    """Also beyond the bytes after which room would be made. A file, as no permission stops root."""
    (tmp_path / "file").write_bytes(b"")
    cache = ImageCache(str(tmp_path / "file" / "cache" if where == "below a file" else tmp_path / "file"), 500)
    uris = [put(number) for number in range(10)]
    for uri in [*uris, *uris]:
        assert len(cache.read(uri)) == SIZE
    assert reads == [*uris, *uris]
    assert (tmp_path / "file").read_bytes() == b""


def test_a_full_disk_costs_nothing_but_speed(
    tmp_path: Path, put: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    cache = ImageCache(str(tmp_path), 500)
    uri = put(3)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert cache.read(uri) == bytes([3]) * SIZE
    assert list(tmp_path.iterdir()) == []  # no half of it
    assert cache.read(uri) == bytes([3]) * SIZE


def test_another_users_file_is_used_though_its_time_cannot_be_set(
    tmp_path: Path, put: Callable[[int], str], reads: CountedReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    cache = ImageCache(str(tmp_path), 500)
    uri = put(1)
    cache.read(uri)
    monkeypatch.setattr(os, "utime", refused)
    assert cache.read(uri) == bytes([1]) * SIZE
    assert reads == [uri]


def test_what_else_is_in_the_folder_stays(tmp_path: Path, put: Callable[[int], str]) -> None:
    own = tmp_path / "thesis.txt"
    own.write_bytes(bytes(5_000))
    os.utime(own, (0, 0))
    (tmp_path / "folder").mkdir()
    cache = ImageCache(str(tmp_path), 1_000)
    for number in range(30):
        cache.read(put(number))
    assert own.read_bytes() == bytes(5_000)
    assert 5 < len([path for path in tmp_path.iterdir() if path.is_file()]) <= 11


def test_what_a_killed_writer_left_goes_too(tmp_path: Path, put: Callable[[int], str]) -> None:
    left = tmp_path / f"{'0' * 64}.{'1' * 32}"
    left.write_bytes(bytes(900))
    os.utime(left, (0, 0))
    cache = ImageCache(str(tmp_path), 1_000)
    cache.read(put(1))
    cache.read(put(2))
    assert kept(tmp_path) == [1, 2]


_READER = """
import sys
from pipeline import storage
from pipeline.image_cache import ImageCache

folder, bound, first, last, *absent = sys.argv[1:]
is_absent = bool(absent)

def read_bytes(uri):
    assert not is_absent, uri
    return bytes([int(uri.rpartition("/")[2])]) * 100

storage.read_bytes = read_bytes
cache = ImageCache(folder, int(bound))
for _ in range(20):
    for number in range(int(first), int(last)):
        assert cache.read(f"memory://shared/{number}") == bytes([number]) * 100, number
"""


def reader(folder: Path, bound: int, first: int, last: int, *absent: str) -> subprocess.Popen[bytes]:
    """A process that reads objects again and again; `absent`: they are in the cache alone."""
    arguments = [str(folder), str(bound), str(first), str(last), *absent]
    return subprocess.Popen([sys.executable, "-c", _READER, *arguments], cwd=ROOT)


def test_processes_share_the_folder_and_its_bound(tmp_path: Path) -> None:
    """Two at once, under a bound for a third of what they read; and one that finds what another has read."""
    both = [reader(tmp_path / "tight", 2_000, 0, 40), reader(tmp_path / "tight", 2_000, 20, 60)]
    writer = reader(tmp_path / "wide", 100_000, 0, 9)
    assert [process.wait(60) for process in (*both, writer)] == [0, 0, 0]
    assert 0 < kept_bytes(tmp_path / "tight") <= 2_000 + 2 * (2_000 // 16 + SIZE)
    assert kept(tmp_path / "wide") == list(range(9))
    assert reader(tmp_path / "wide", 100_000, 0, 9, "absent").wait(60) == 0


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        ImageCache("cache", -1)

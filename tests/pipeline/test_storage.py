"""One conformance suite for every backend, then what is particular to one of them."""

from __future__ import annotations

import io
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import fsspec.asyn
import pytest
import stamina

from pipeline import storage
from pipeline.archive import list_images
from pipeline.errors import ConfigError
from pipeline.storage import FileInfo, join

ODD_NAMES = [
    *["a b.jpg", "c#d.jpg", "e%20.jpg", "f+g&h.jpg", "ü/ñ 你.jpg", "x?y.jpg", "[1].jpg", "a::b.jpg", "~'\"!.jpg"],
    *[
        "100%",
        "%E4%BD%A0.jpg",
        "<a>&amp;]]>.jpg",
        "k=v;w=x.jpg",
        " a /  b",
        "😀\U0010ffff.jpg",
        "e\u0301.jpg",
        "-.._*@:,.jpg",
    ],
    "l" * 255,
    "/".join(["d" * 200] * 4) + "/x.jpg",
]


def names(root: str, **options: object) -> list[str]:
    return [file.uri.removeprefix(root.rstrip("/") + "/") for file in storage.list_files(root, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_what_is_written_is_read_under_any_name(store: str, name: str) -> None:
    uri = join(store, name)
    storage.write_bytes(uri, b"payload of " + name.encode())
    assert storage.read_bytes(uri) == b"payload of " + name.encode()
    assert storage.exists(uri)
    assert storage.info(uri).size == len(b"payload of ") + len(name.encode())
    assert names(store) == [name]
    assert next(iter(storage.list_files(store))) == storage.info(uri)


def test_write_replaces_and_changes_the_version(store: str) -> None:
    uri = join(store, "x")
    versions = set()
    for content in (b"one", b"two", b"", b"three"):
        storage.write_bytes(uri, content)
        assert storage.read_bytes(uri) == content
        versions.add(storage.info(uri).version)
    assert len(versions) == 4
    assert names(store) == ["x"]  # nothing temporary stays


def test_ranges_end_at_the_end_of_the_object(store: str) -> None:
    uri = join(store, "x")
    storage.write_bytes(uri, bytes(range(100)))
    assert storage.read_range(uri, 0, 10) == bytes(range(10))
    assert storage.read_range(uri, 90, 1000) == bytes(range(90, 100))
    assert storage.read_range(uri, 99, 1) == bytes([99])
    assert storage.read_range(uri, 100, 5) == b""
    assert storage.read_range(uri, 5000, 5) == b""
    assert storage.read_range(uri, 7, 0) == b""
    with pytest.raises(ValueError, match="start=-1"):
        storage.read_range(uri, -1, 5)


def test_what_is_not_there_is_a_file_not_found(store: str) -> None:
    storage.write_bytes(join(store, "folder/x"), b"x")
    for uri in (join(store, "absent"), join(store, "no/such/folder/absent")):
        assert not storage.exists(uri)
        storage.delete(uri)
        for call in (storage.read_bytes, storage.info, lambda uri: storage.read_range(uri, 0, 1)):
            with pytest.raises(FileNotFoundError) as caught:
                call(uri)
            assert uri in str(caught.value)
    assert not storage.exists(join(store, "folder"))
    with pytest.raises(IsADirectoryError):
        storage.info(join(store, "folder"))
    assert names(join(store, "absent")) == []


def test_delete_deletes(store: str) -> None:
    uri = join(store, "x")
    storage.write_bytes(uri, b"x")
    storage.delete(uri)
    assert not storage.exists(uri)


def test_listing_is_recursive_and_in_the_order_of_keys(store: str) -> None:
    keys = ["a.jpg", "a/b.jpg", "a/b/c.jpg", "a0.jpg", "B/x.jpg", "z/1.jpg", "z/10.jpg", "z/2.jpg", "é.jpg"]
    for key in keys:
        storage.write_bytes(join(store, key), key.encode())
    assert names(store) == sorted(keys)
    assert names(store + "/") == sorted(keys)
    assert names(join(store, "a")) == ["b.jpg", "b/c.jpg"]  # not a0.jpg, which only begins alike
    assert [file.size for file in storage.list_files(store)] == [len(key.encode()) for key in sorted(keys)]


def test_listings_of_more_than_a_page_are_whole(store: str) -> None:
    fs, path = storage.resolve(store)
    keys = [f"{index:04d}.jpg" for index in range(1_005)]  # a page holds 1,000
    fs.makedirs(path, exist_ok=True)
    fs.pipe({f"{path}/{key}": b"x" for key in keys})
    assert names(store) == keys


def test_listing_leaves_out_folders(store: str) -> None:
    keys = ["a/1", "a/out/2", "a/out/deep/3", "a/outside/4", "b/_marker", "b/c/6", "b/x", "d/7"]
    for key in keys:
        storage.write_bytes(join(store, key), b"x")
    skipped = join(store, "a/out")
    assert names(store, skip_folder=lambda folder: folder == skipped, marker="_marker") == ["a/1", "a/outside/4", "d/7"]
    assert names(store, skip_folder=lambda folder: folder == store) == []


def test_create_exclusive_creates_once(store: str) -> None:
    uri = join(store, "commits/x.json")
    assert storage.create_exclusive(uri, b"first") is True
    assert storage.create_exclusive(uri, b"second") is False
    assert storage.read_bytes(uri) == b"first"
    assert names(store) == ["commits/x.json"]
    storage.write_bytes(join(store, "y"), b"written")
    assert storage.create_exclusive(join(store, "y"), b"created") is False
    with pytest.raises(ValueError, match="needs a body"):
        storage.create_exclusive(join(store, "z"), b"")
    assert not storage.exists(join(store, "z"))


def test_the_probe_finds_exclusive_creation_and_cleans_up(store: str) -> None:
    assert storage.honours_create_exclusive(store)
    assert names(store) == []


def test_the_probe_sees_a_store_that_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", os.replace)
    monkeypatch.setattr(os, "unlink", lambda _: None)
    assert not storage.honours_create_exclusive(str(tmp_path))


def test_resolve_serves_other_libraries(store: str) -> None:
    uri = join(store, "x y")
    storage.write_bytes(uri, b"x")
    fs, path = storage.resolve(uri)
    with fs.open(path, "rb") as file:
        assert file.read() == b"x"


@pytest.mark.parametrize("uri", ["simplecache::s3://bucket/x", "zip://x.jpg::s3://bucket/x.zip", "s3://a/b::s3://c/d"])
def test_chained_uris_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="chained"):
        storage.resolve(uri)


def test_unknown_schemes_and_credentials_are_refused() -> None:
    with pytest.raises(ConfigError, match="no storage for https://"):
        storage.resolve("https://example.invalid/x.jpg")
    with pytest.raises(ConfigError, match="environment") as caught:
        storage.resolve("s3://key:hidden@bucket/x")
    assert "hidden" not in str(caught.value)
    with pytest.raises(ConfigError, match="credentials in a URI") as caught:
        list(list_images(["memory://key:hidden@bucket/x"]))
    assert "hidden" not in str(caught.value)


@pytest.mark.usefixtures("fresh_clients")
def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("No module named 'gcsfs'")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(ConfigError, match=r"maskline\[gcs\]"):
        storage.read_bytes("gs://bucket/x")


def test_public_uri_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.public_uri("a/../b.jpg") == str(tmp_path / "b.jpg")
    assert storage.public_uri(f"file://{tmp_path}/x y.jpg") == f"{tmp_path}/x y.jpg"
    assert storage.public_uri("S3://user:secret@bucket/k.jpg?versionId=1&x=2") == "s3://bucket/k.jpg"
    assert storage.public_uri("s3://bucket/a@b:c/what?.jpg") == "s3://bucket/a@b:c/what?.jpg"
    assert (
        storage.public_uri("abfs://box@account.dfs.core.windows.net/x") == "abfs://box@account.dfs.core.windows.net/x"
    )
    assert storage.public_uri("/a?b=c") == "/a?b=c"


def test_join_puts_one_slash_between() -> None:
    assert join("s3://bucket", "a", "b.json") == join("s3://bucket/", "/a/", "b.json") == "s3://bucket/a/b.json"
    assert join("/", "a") == "/a"
    assert join("memory://", "a") == "memory://a"


# ---------------------------------------------------------------------------------------------------------- local


def test_a_reader_never_sees_half_a_local_write(tmp_path: Path) -> None:
    uri = str(tmp_path / "x")
    contents = [bytes([digit]) * 300_000 for digit in range(2)]
    storage.write_bytes(uri, contents[0])
    stop = threading.Event()

    def write() -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            storage.write_bytes(uri, contents[turn % 2])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(storage.read_bytes(uri) in contents for _ in range(300))
    finally:
        stop.set()
        writer.join()


def test_a_read_that_the_disk_cuts_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reluctant(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(size if size is None or size < 0 else min(3, size))

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return super().readinto(buffer[:3])

    def reluctant(path: str, mode: str, buffering: int = -1) -> BinaryIO | io.BufferedReader:
        assert mode == "rb"
        return Reluctant(path) if buffering == 0 else io.BufferedReader(Reluctant(path))

    uri = str(tmp_path / "x")
    storage.write_bytes(uri, bytes(range(100)))
    monkeypatch.setattr(storage, "open", reluctant, raising=False)
    assert storage.read_range(uri, 10, 50) == bytes(range(10, 60))
    assert storage.read_range(uri, 90, 50) == bytes(range(90, 100))
    assert storage.read_bytes(uri) == bytes(range(100))


def test_what_a_killed_writer_left_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(os, "unlink", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(str(tmp_path / "x"), b"x")
    assert len(os.listdir(tmp_path)) == 1
    assert names(str(tmp_path)) == []


def test_local_listing_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/linked").symlink_to(tmp_path / "real")
    (tmp_path / "root/circle").symlink_to(tmp_path / "root")
    (tmp_path / "root/dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "root/self").symlink_to(tmp_path / "root/self")
    os.mkfifo(tmp_path / "root/pipe")
    listed = list(storage.list_files(str(tmp_path / "root")))
    assert [file.uri.removeprefix(f"{tmp_path}/root/") for file in listed] == ["dangling", "linked/x", "self"]
    assert listed[0] == FileInfo(f"{tmp_path}/root/dangling", -1, storage.MISSING_VERSION)
    assert listed[2] == FileInfo(f"{tmp_path}/root/self", -1, storage.MISSING_VERSION)


# ------------------------------------------------------------------------------------------------------------- S3


@pytest.mark.usefixtures("fresh_clients")
def test_s3_without_credentials_names_the_next_step(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
        storage.read_bytes(join(s3_root, "x"))


def test_s3_unreachable_is_an_os_error(
    s3_root: str, s3_environment: Callable[[str], None], unused_endpoint: str
) -> None:
    s3_environment(unused_endpoint)
    with stamina.set_testing(True, attempts=2), pytest.raises(OSError, match="connect"):
        storage.read_bytes(join(s3_root, "x"))


# ---------------------------------------------------------------------------------------------------------- Azure


def test_azure_folders_are_not_listed(az_root: str) -> None:
    fs, path = storage.resolve(az_root)
    fs.pipe_file(f"{path}/a/x", b"x")
    container, key, _ = fs.split_path(f"{path}/a")
    blob = fs.service_client.get_blob_client(container, key)
    fsspec.asyn.sync(fs.loop, blob.upload_blob, b"", metadata={"hdi_isfolder": "true"})
    assert names(az_root) == ["a/x"]


@pytest.mark.parametrize("name", ["x?", "x#", "x?versionid=1", "new\nline"])
def test_a_key_that_the_azure_client_mistakes_is_refused(az_root: str, name: str) -> None:
    with pytest.raises(OSError, match="would take this key for"):
        storage.read_bytes(join(az_root, name))


@pytest.mark.usefixtures("fresh_clients")
def test_azure_without_an_account_names_the_next_step(az_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_KEY"):
        storage.read_bytes(join(az_root, "x"))


@pytest.mark.parametrize("store", ["s3", "az", "gs"], indirect=True)
def test_a_missing_bucket_is_a_file_not_found(store: str) -> None:
    scheme = store.split("://", maxsplit=1)[0]
    uri = f"{scheme}://maskline-never-made/x"
    assert not storage.exists(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    with pytest.raises(FileNotFoundError):
        list(storage.list_files(f"{scheme}://maskline-never-made"))

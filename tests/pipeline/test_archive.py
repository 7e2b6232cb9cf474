"""What goes for every kind of input: the same images, keys, order, and errors."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.archive import ITEM_SCHEMA, ArchiveLimits, Listing
from pipeline.errors import ConfigError
from pipeline.items import original, printable
from pipeline.storage import join
from tests.pipeline.archives import (
    IMAGES,
    NOTES,
    csv_bytes,
    listed,
    payloads,
    table_bytes,
    tar_bytes,
    write_store,
    zip_bytes,
)
from tests.pipeline.s3_server import FaultyProxy


def keys(items: pa.Table, root: str) -> list[str]:
    return [key.removeprefix(root + "/") for key in items["image_key"].to_pylist()]


def test_every_kind_of_input_gives_the_same_images_in_the_same_order(store: str) -> None:
    for name, uri in write_store(store).items():
        listing = Listing()
        items = listed(uri, listing=listing)
        assert items.schema == ITEM_SCHEMA
        assert payloads(items) == list(IMAGES.values()), name
        assert listing.images == 12, name
        assert listing.failed_archives == listing.missing == 0, name
        assert len(set(items["image_key"].to_pylist())) == 12, name
        if "parquet" not in set(items["kind"].to_pylist()):
            assert items["bytes"].to_pylist() == [len(image) for image in IMAGES.values()], name
            assert listing.bytes == sum(map(len, IMAGES.values())), name
        assert listed(uri).equals(items), name


def test_keys_name_the_image_in_its_archive(store: str) -> None:
    inputs = write_store(store)
    member = next(iter(IMAGES))
    assert keys(listed(inputs["loose"]), store)[0] == f"loose/{member}"
    assert keys(listed(inputs["m.csv"]), store)[0] == f"loose/{member}"
    assert keys(listed(inputs["a.tar"]), store)[0] == f"a.tar#{member}"
    assert keys(listed(inputs["a.tar.gz"]), store)[0] == f"a.tar.gz#{member}"
    assert keys(listed(inputs["a.zip"]), store)[0] == f"a.zip#{member}"
    assert keys(listed(inputs["struct.parquet"]), store) == [f"struct.parquet#{row}" for row in range(12)]


def test_versions_are_those_of_the_object_that_holds_the_image(store: str) -> None:
    inputs = write_store(store)
    loose = listed(inputs["loose"])
    assert loose["source_version"][3].as_py() == storage.info(loose["image_key"][3].as_py()).version
    for name in ("a.tar", "a.zip", "struct.parquet"):
        assert set(listed(inputs[name])["source_version"].to_pylist()) == {storage.info(inputs[name]).version}


def test_a_prefix_takes_images_by_extension_and_expands_archives(store: str) -> None:
    for name in ("x.JPG", "y.tiff", "z.webp", "notes.md", "._x.JPG", "list.csv", "Makefile", "deep/er/w.jpeg"):
        storage.write_bytes(join(store, name), b"content of " + name.encode())
    storage.write_bytes(join(store, "deep/a.tar"), tar_bytes({"m.jpg": b"m", "m.txt": b"t"}))
    storage.write_bytes(join(store, "numbers.parquet"), table_bytes({"n": [1, 2]}))
    listing = Listing()
    items = listed(store, listing=listing)
    assert sorted(keys(items, store)) == ["deep/a.tar#m.jpg", "deep/er/w.jpeg", "x.JPG", "y.tiff", "z.webp"]
    assert listing.skipped == {".md": 1, ".csv": 1, "(none)": 1, ".jpg": 1, ".txt": 1, ".parquet": 1}


def test_what_is_named_is_taken_whatever_its_extension(store: str) -> None:
    for name in ("photo.dat", "photo", "b/photo.dat", "readme.txt"):
        storage.write_bytes(join(store, name), b"content of " + name.encode())
    assert keys(listed(join(store, "photo.dat")), store) == ["photo.dat"]
    assert keys(listed(join(store, "photo")), store) == ["photo"]
    assert keys(listed(join(store, "**/*.dat")), store) == ["b/photo.dat", "photo.dat"]
    listing = Listing()
    assert keys(listed(join(store, "*"), listing=listing), store) == ["photo", "photo.dat"]
    assert listing.skipped[".txt"] == 1  # a note beside the images, not a manifest
    assert listing.skipped[".dat"] == 1  # in a folder that the glob names: by extension


def test_globs_enter_the_folders_they_name(store: str) -> None:
    for name in ("2024-01/a.jpg", "2024-02/deep/b.jpg", "2023-12/c.jpg", "2024-03.jpg", "x/2024-01/d.jpg"):
        storage.write_bytes(join(store, name), b"x")
    assert keys(listed(join(store, "2024-*")), store) == ["2024-01/a.jpg", "2024-02/deep/b.jpg", "2024-03.jpg"]
    assert keys(listed(join(store, "2024-0?/*.jpg")), store) == ["2024-01/a.jpg"]
    assert keys(listed(join(store, "**/2024-01/*.jpg")), store) == ["2024-01/a.jpg", "x/2024-01/d.jpg"]
    assert keys(listed(join(store, "*/deep")), store) == ["2024-02/deep/b.jpg"]


def test_a_literal_name_is_no_glob(store: str) -> None:
    storage.write_bytes(join(store, "set[1]/a?.jpg"), b"x")
    storage.write_bytes(join(store, "set1/ab.jpg"), b"y")
    assert keys(listed(join(store, "set[1]/a?.jpg")), store) == ["set[1]/a?.jpg"]
    if storage.is_local(store):
        assert keys(listed(join(store, "set[1]")), store) == ["set[1]/a?.jpg"]


def test_results_are_never_listed(store: str) -> None:
    for name in ("a.jpg", "out/x.jpg", "outside/b.jpg", "old/_maskline.json", "old/images/y.jpg"):
        storage.write_bytes(join(store, name), b"x")
    assert keys(listed(store, exclude=join(store, "out")), store) == ["a.jpg", "outside/b.jpg"]
    assert keys(listed(join(store, "**/*.jpg"), exclude=join(store, "out/")), store) == ["a.jpg", "outside/b.jpg"]
    with pytest.raises(ConfigError, match="no images at"):
        listed(join(store, "old"))


def test_inputs_follow_one_another_and_may_overlap(store: str) -> None:
    storage.write_bytes(join(store, "b.jpg"), b"b")
    storage.write_bytes(join(store, "a.jpg"), b"a")
    assert keys(listed(join(store, "b.jpg"), store), store) == ["b.jpg", "a.jpg", "b.jpg"]


@pytest.mark.parametrize("name", ["nothing", "nothing/", "no*.jpg", "gone.tar", "notes"])
def test_an_input_without_images_is_a_config_error(store: str, name: str) -> None:
    storage.write_bytes(join(store, "notes/a.md"), b"x")
    with pytest.raises(ConfigError, match="no images at") as caught:
        listed(join(store, name))
    assert join(store, name).rstrip("/") in str(caught.value)
    assert ("1 .md" in str(caught.value)) == (name == "notes")


def test_a_bucket_that_is_not_there_is_a_config_error(s3_root: str) -> None:
    with pytest.raises(ConfigError, match="no-such-bucket"):
        listed("s3://no-such-bucket/images")


def test_relative_paths_become_absolute_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for given in ("a", "./a/", "a/x.jpg", "a/*.jpg", f"file://{tmp_path}/a"):
        assert listed(given)["image_key"].to_pylist() == [f"{tmp_path}/a/x.jpg"]


def test_the_order_of_items_is_kept_whatever_holds_them(store: str) -> None:
    inputs = write_store(store)
    items = listed(*(inputs[name] for name in ("a.tar.gz", "loose", "struct.parquet", "a.zip", "a.tar")))
    shuffled = [(7 * row + 3) % items.num_rows for row in range(items.num_rows)]  # 7 and 60 have no common factor
    expected = payloads(items)
    assert payloads(items.take(shuffled)) == [expected[row] for row in shuffled]
    backwards = list(range(items.num_rows))[::-1]
    assert payloads(items.take(backwards)) == expected[::-1]
    some = [1, 5, 6, 13, 20, 26, 31, 40, 47, 50, 59]
    assert payloads(items.take(some), threads=1) == [expected[row] for row in some]


def test_what_is_gone_is_missing_and_what_changed_too(store: str) -> None:
    inputs = write_store(store)
    for name in ("a.tar", "a.tar.gz", "a.zip", "struct.parquet"):
        items = listed(inputs[name])
        storage.write_bytes(inputs[name], tar_bytes({"other.jpg": b"other"}))
        assert payloads(items) == ["missing"] * 12, name
        storage.delete(inputs[name])
        assert payloads(items) == ["missing"] * 12, name
    items = listed(inputs["loose"])
    storage.delete(items["image_key"][4].as_py())
    assert payloads(items) == [*list(IMAGES.values())[:4], "missing", *list(IMAGES.values())[5:]]


def test_too_large_images_are_refused_one_by_one(store: str) -> None:
    images = {"a.jpg": b"a" * 10, "b.jpg": b"b" * 11, "c.jpg": b"", "d.jpg": b"d"}
    limits = ArchiveLimits(max_image_bytes=10)
    for name, content in images.items():
        storage.write_bytes(join(store, "loose", name), content)
    storage.write_bytes(join(store, "a.tar"), tar_bytes(images))
    storage.write_bytes(join(store, "a.tgz"), tar_bytes(images, "w:gz"))
    storage.write_bytes(join(store, "a.zip"), zip_bytes(images))
    storage.write_bytes(join(store, "a.parquet"), table_bytes({"image": list(images.values())}))
    for name in ("loose", "a.tar", "a.tgz", "a.zip", "a.parquet"):
        assert payloads(listed(join(store, name)), limits) == [b"a" * 10, "too_large", b"", b"d"], name


def test_more_members_than_allowed_end_the_listing_with_one_row(store: str) -> None:
    inputs = write_store(store)
    for name in ("a.tar", "a.tar.gz", "a.zip", "struct.parquet"):
        items = listed(inputs[name], limits=ArchiveLimits(max_members=7))
        assert items["kind"].to_pylist()[-1] == "failed", name
        assert items["image_key"].to_pylist()[-1] == inputs[name], name
        assert items["error"].to_pylist()[-1].startswith("too_large: more than 7"), name
        assert items.num_rows == (8 if "parquet" in name else 8 - len(NOTES)), name
        assert payloads(items)[-1] == "too_large", name


@pytest.mark.parametrize("name", ["max_image_bytes", "max_members", "max_compression_ratio"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        ArchiveLimits(**{name: 0})


# ------------------------------------------------------------------------------------------------------ manifests


HEADERS = [
    [["uri"]],
    [["URL", "label"]],
    [["label", "file_name"]],
    [["image_key", "x"]],
    [["photograph", "label"]],
    [],
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: "-".join(header[0]) if header else "none")
def test_csv_headers(store: str, header: list[list[str]]) -> None:
    storage.write_bytes(join(store, "a b,c.jpg"), b"x")
    column = next((i for i, name in enumerate(header[0] if header else []) if name in ("file_name",)), 0)
    row = ["7", "7"]
    row[column] = "a b,c.jpg"
    storage.write_bytes(join(store, "m.csv"), b"\xef\xbb\xbf" + csv_bytes([*header, row]))
    assert keys(listed(join(store, "m.csv")), store) == ["a b,c.jpg"]


def test_manifest_entries_may_be_missing_archives_or_refused(store: str) -> None:
    storage.write_bytes(join(store, "photos/x.dat"), b"x")
    storage.write_bytes(join(store, "lists/a.tar"), tar_bytes({"m.jpg": b"m"}))
    storage.write_bytes(join(store, "lists/b.parquet"), table_bytes({"n": [1]}))
    entries = ["../photos/x.dat", "gone.jpg", "a.tar", "gone.tar", "../photos", "m.txt", "b.parquet", "  # note"]
    storage.write_bytes(join(store, "lists/m.txt"), "\r\n".join(entries).encode())
    listing = Listing()
    items = listed(join(store, "lists/m.txt"), listing=listing)
    assert list(zip(keys(items, store), payloads(items), strict=True)) == [
        ("photos/x.dat", b"x"),
        ("lists/gone.jpg", "missing"),
        ("lists/a.tar#m.jpg", b"m"),
        ("lists/gone.tar", "missing"),
        ("photos", "unsupported"),
        ("lists/m.txt", "unsupported"),
        ("lists/b.parquet", "unsupported"),
    ]
    assert listing.missing == 2
    assert items["source_version"][1].as_py() == "missing"


def test_long_manifests_keep_their_order(s3_root: str) -> None:
    written = [f"{index:03d}.jpg" for index in range(12)]
    for name in written:
        storage.write_bytes(join(s3_root, name), name.encode())
    entries = [written[(5 * index) % 12] if index % 3 else f"gone-{index}.jpg" for index in range(550)]
    storage.write_bytes(join(s3_root, "m.txt"), "\n".join(entries).encode())
    assert keys(listed(join(s3_root, "m.txt")), s3_root) == entries


def test_senseless_local_entries_are_missing(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    (tmp_path / "m.txt").write_text("\n".join(["a" * 5000, "x.jpg/y.jpg", "x.jpg"]))
    assert payloads(listed(str(tmp_path / "m.txt"))) == ["missing", "missing", b"x"]


def test_a_wrong_manifest_is_a_config_error(store: str) -> None:
    storage.write_bytes(join(store, "n.parquet"), table_bytes({"n": [1], "s": ["x"]}))
    with pytest.raises(ConfigError, match=r"no column of encoded images \(nor of URIs\) among n, s"):
        listed(join(store, "n.parquet"))
    storage.write_bytes(join(store, "empty.txt"), b"# nothing\n")
    with pytest.raises(ConfigError, match="no images at"):
        listed(join(store, "empty.txt"))
    storage.write_bytes(join(store, "binary.txt"), bytes(range(256)))
    with pytest.raises(ConfigError, match="NUL"):
        listed(join(store, "binary.txt"))
    storage.write_bytes(join(store, "http.txt"), b"https://example.invalid/x.jpg\n")
    with pytest.raises(ConfigError, match="no storage for https://"):
        listed(join(store, "http.txt"))


# ---------------------------------------------------------------------------------------------- one kind of store


def test_names_that_are_not_utf8_have_printable_unique_keys(tmp_path: Path) -> None:
    raw = [b"\xff.jpg", b"\xfe.jpg", "\ufffdff.jpg".encode(), "ü.jpg".encode(), b"a\\xff.jpg"]
    for name in raw:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(name)
    items = listed(str(tmp_path))
    found = items["image_key"].to_pylist()
    assert len(set(found)) == len(raw)
    assert sorted(payload for payload in payloads(items) if isinstance(payload, bytes)) == sorted(raw)
    assert all(original(key) == os.fsdecode(os.fsencode(original(key))) for key in found)
    assert f"{tmp_path}/ü.jpg" in found


def test_printable_names_are_reversible() -> None:
    for raw in (
        b"plain",
        b"\xff\xfe",
        "\ufffd".encode(),
        "\ufffd\ufffdab".encode(),
        b"\xef\xbf\xbdff\xff",
        "é你".encode(),
    ):
        name = os.fsdecode(raw)
        assert original(printable(name)) == name
        printable(name).encode()  # Arrow can hold it


def test_local_images_that_may_not_be_read_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "c.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "d.jpg").symlink_to(tmp_path / "d.jpg")
    listing = Listing()
    items = listed(str(tmp_path), listing=listing)
    read = storage.read_bytes

    def guarded(uri: str) -> bytes:
        if uri.endswith("b.jpg"):  # the tests may run as root, whom no mode bits stop
            raise PermissionError(13, "Permission denied", uri)
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", guarded)
    assert payloads(items) == [b"a.jpg", "unreadable", "missing", "missing"]
    assert listing.missing == 2


def test_a_store_that_stays_broken_raises(s3_root: str, faulty_s3: FaultyProxy) -> None:
    inputs = write_store(s3_root)
    for name in ("loose", "a.tar", "a.tar.gz", "a.zip", "struct.parquet", "m.csv"):
        items = listed(inputs[name])
        faulty_s3.faults = ["500"] * 500
        with pytest.raises(OSError, match=r"as asked|Internal Server Error"):
            payloads(items, threads=2)
        with pytest.raises(OSError, match=r"as asked|Internal Server Error"):
            listed(inputs[name])
        faulty_s3.faults = []


def test_a_store_that_recovers_loses_nothing(s3_root: str, faulty_s3: FaultyProxy) -> None:
    inputs = write_store(s3_root)
    for name in ("loose", "a.tar", "a.tar.gz", "a.zip", "struct.parquet", "m.csv"):
        faulty_s3.faults = ["503", "", "reset", "", "", "lost", "503"]
        assert payloads(listed(inputs[name])) == list(IMAGES.values()), name


def test_no_access_to_a_bucket_is_a_config_error(s3_root: str, faulty_s3: FaultyProxy) -> None:
    faulty_s3.faults = ["403"] * 10
    with pytest.raises(ConfigError, match="no access to"):
        listed(s3_root)

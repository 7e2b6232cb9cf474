from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DecodeError
from pipeline.originals import container_of, read_originals
from tests.pipeline.archives import IMAGES, listed, struct_column, table_bytes, tar_bytes, zip_bytes
from tests.pipeline.bad_images import read


@pytest.mark.parametrize(
    ("key", "container"),
    [
        ("/a/b.jpg", "/a/b.jpg"),
        ("s3://b/x.tar#0/00.jpg", "s3://b/x.tar"),
        ("s3://b/x.TAR.GZ#0/#1.jpg", "s3://b/x.TAR.GZ"),
        ("/a/odd#name.jpg", "/a/odd#name.jpg"),
        ("/a#b/x.zip#y.zip#z.png", "/a#b/x.zip"),
        ("gs://b/t.parquet#17", "gs://b/t.parquet"),
    ],
)
def test_the_archive_is_what_stands_before_its_member(key: str, container: str) -> None:
    assert container_of(key) == container


def test_every_listed_key_gives_its_picture(tmp_path: Path) -> None:
    (tmp_path / "odd#name.png").write_bytes(next(iter(IMAGES.values())))
    (tmp_path / "a.tar").write_bytes(tar_bytes())
    (tmp_path / "a.tgz").write_bytes(tar_bytes(mode="w:gz"))
    (tmp_path / "a.zip").write_bytes(zip_bytes())
    (tmp_path / "a.parquet").write_bytes(table_bytes({"image": struct_column(IMAGES.values())}))
    keys = listed(str(tmp_path))["image_key"].to_pylist()
    assert len(keys) == 1 + 4 * len(IMAGES)
    by_name = {name: read(data) for name, data in IMAGES.items()}
    in_order = list(by_name.values())
    for key, picture in read_originals(list(reversed(keys))).items():
        container, _, member = key.partition("#")
        assert isinstance(picture, np.ndarray), key
        if container.endswith(".parquet"):
            expected = in_order[int(member)]
        else:
            expected = in_order[0] if member == "name.png" else by_name[member]
        assert np.array_equal(picture, expected), key


def test_what_is_gone_or_damaged_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "a.zip").write_bytes(zip_bytes())
    keys = [f"{tmp_path}/gone.jpg", f"{tmp_path}/bad.jpg", f"{tmp_path}/a.zip#no.png", f"{tmp_path}/gone.tar#x.jpg"]
    found = read_originals(keys)
    assert list(found) == keys
    errors = [picture for picture in found.values() if isinstance(picture, DecodeError)]
    assert [error.reason for error in errors] == ["unreadable", "unreadable", "missing", "unreadable"]

"""What is fuzzed: code that reads bytes from anyone. A target answers, or raises what it promises to raise."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import fsspec
import numpy as np
import safetensors.torch
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import model
from model import rle
from model.array_pickle import load_arrays
from model.weights import to_bytes
from pipeline import commits, decode
from pipeline.archive import ArchiveLimits
from pipeline.decode import DecodeLimits
from pipeline.errors import ArchiveError, CommitError, ConfigError, DecodeError
from pipeline.results import Results
from tests.pipeline import archives
from tests.pipeline.bad_images import make_bad_images
from tests.pipeline.test_commits import make_commit

LIMITS = DecodeLimits(max_image_bytes=1 << 20, max_image_pixels=1 << 16)
"""Small, so that many are tried in a minute."""
ARCHIVE_LIMITS = ArchiveLimits(max_image_bytes=1 << 20)
SIZE = (40, 60)
"""Of the masks."""


class Target(NamedTuple):
    """One reader of bytes."""

    read: Callable[[bytes], object]
    seeds: Callable[[], Iterator[bytes]]
    """Valid and nearly valid input to begin with."""


def read_image(data: bytes) -> None:
    with suppress(DecodeError):
        header = decode.inspect(data, LIMITS)
        pixels = decode.decode(data, header)
        assert pixels.shape == (*header.decoded_size, 3)
        assert pixels.dtype == np.uint8


def image_seeds() -> Iterator[bytes]:
    with TemporaryDirectory() as folder:
        make_bad_images(Path(folder))
        yield from (path.read_bytes() for path in Path(folder).iterdir() if path.is_file())
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        file = io.BytesIO()
        Image.new("RGB", (17, 9), (9, 120, 40)).save(file, image_format)
        yield file.getvalue()


def archive_reader(extension: str) -> Callable[[bytes], None]:
    """Lists a file of that name and reads what it holds."""

    def read(data: bytes) -> None:
        uri = f"memory://fuzz/x{extension}"
        fsspec.filesystem("memory").pipe_file("/fuzz/x" + extension, data)
        with suppress(ConfigError, ArchiveError):
            items = archives.listed(uri, limits=ARCHIVE_LIMITS)
            found = archives.payloads(items, ARCHIVE_LIMITS, threads=1)
            assert all(len(payload) <= ARCHIVE_LIMITS.max_image_bytes for payload in found)

    return read


def tar_seeds() -> Iterator[bytes]:
    images = dict(list(archives.IMAGES.items())[:3])
    yield archives.tar_bytes(images)
    yield archives.tar_bytes({"a" * 150 + ".png": b"long", "é.png": b"x"})


def tar_gz_seeds() -> Iterator[bytes]:
    yield from (gzip.compress(seed) for seed in tar_seeds())


def zip_seeds() -> Iterator[bytes]:
    images = dict(list(archives.IMAGES.items())[:3])
    yield archives.zip_bytes(images)
    yield archives.zip_bytes(images, method=0)


def parquet_seeds() -> Iterator[bytes]:
    images = list(archives.IMAGES.values())[:3]
    yield archives.table_bytes({"label": range(3), "image": archives.struct_column(images)}, row_group_size=2)
    yield archives.table_bytes({"jpg": images}, compression="none")
    yield archives.table_bytes({"uri": ["memory://fuzz/a.png"]})


def manifest_seeds() -> Iterator[bytes]:
    yield b"memory://fuzz/a.png\n# a note\n\nb.png\n"
    yield archives.csv_bytes([["label", "path"], ["1", "a.png"], ["2", "memory://fuzz/b.png"]])


def read_commit(data: bytes) -> None:
    """As a run does that plans over it, and as a reader does."""
    root = "memory://fuzz/table"
    fsspec.filesystem("memory").pipe_file("/fuzz/table/_commits/s1.json", data)
    with suppress(CommitError):
        for commit in commits.read_commits(root):
            assert commit.to_json()
            assert all(not file.path.startswith("/") and ".." not in file.path for file in commit.files)
            Results(root, [commit]).images()


def commit_seeds() -> Iterator[bytes]:
    yield make_commit("a1", "s1").to_json()


def read_weights(data: bytes) -> None:
    with suppress(ValueError):
        model.describe(data)


def weights_seeds() -> Iterator[bytes]:
    net = model.random_network(model.R18_half_FPN(num_classes=2, min_size=48, max_size=64), seed=0)
    saved = to_bytes(net.network, net.config, net.recipe, net.categories)
    yield saved[: 8 + int.from_bytes(saved[:8], "little")]  # the numbers behind its header would only slow the search
    yield safetensors.torch.save({"a": torch.zeros(2)})
    for tensors in ({"backbone.body.conv1.weight": torch.zeros(2, 3)}, {}):
        file = io.BytesIO()
        torch.save(tensors, file)
        yield file.getvalue()


def read_pickle(data: bytes) -> None:
    with suppress(ValueError):
        load_arrays(data)


def pickle_seeds() -> Iterator[bytes]:
    arrays = {
        "model": {"backbone.w": np.zeros((2, 3), np.float32), "n": 7},
        "__author__": "x",
        "l": [1.5, None, (True,)],
    }
    yield from (pickle.dumps(arrays, protocol) for protocol in (2, 3, 4, 5))


def read_runs(data: bytes) -> None:
    """What we take for a mask, pycocotools takes for the same."""
    encoded = model.Rle(size=list(SIZE), counts=data)
    try:
        mask = rle.decode(encoded)
    except ValueError:
        return
    assert mask.shape == SIZE
    assert np.array_equal(mask, coco_mask.decode(encoded).astype(bool))
    assert rle.area(encoded) == mask.sum()


def runs_seeds() -> Iterator[bytes]:
    chance = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = np.asfortranarray(chance.random(SIZE) < share, np.uint8)
        yield coco_mask.encode(mask)["counts"]


TARGETS = {
    "image": Target(read_image, image_seeds),
    "tar": Target(archive_reader(".tar"), tar_seeds),
    "tar.gz": Target(archive_reader(".tar.gz"), tar_gz_seeds),
    "zip": Target(archive_reader(".zip"), zip_seeds),
    "parquet": Target(archive_reader(".parquet"), parquet_seeds),
    "manifest.txt": Target(archive_reader(".txt"), manifest_seeds),
    "manifest.csv": Target(archive_reader(".csv"), manifest_seeds),
    "commit": Target(read_commit, commit_seeds),
    "weights": Target(read_weights, weights_seeds),
    "pickle": Target(read_pickle, pickle_seeds),
    "runs": Target(read_runs, runs_seeds),
}

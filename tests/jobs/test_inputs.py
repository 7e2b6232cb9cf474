"""The same images give the same instances, whatever they are packed in and wherever they lie."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import model
from jobs.segment import segment
from jobs.segment_config import SegmentConfig
from pipeline import storage
from pipeline.results import open_results
from pipeline.scenes import write_archive
from tests.jobs.conftest import small_network
from tests.pipeline.archives import tar_bytes, zip_bytes

DATA = Path(os.environ.get("MASKLINE_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write_inputs(images: dict[str, bytes], folder: str, bucket: str) -> dict[str, str]:
    """The images in every form that ``maskline segment`` takes; a name for each form, and its URI."""

    def put(name: str, data: bytes, root: str = folder) -> str:
        storage.write_bytes(storage.join(root, name), data)
        return storage.join(root, name)

    loose = [put(f"loose/{name}", data) for name, data in images.items()]
    for name, data in images.items():
        put(f"loose/{name}", data, bucket)
    rows = io.StringIO()
    csv.writer(rows).writerows([["id", "uri"], *([str(index), uri] for index, uri in enumerate(loose))])
    structs = [{"bytes": data, "path": name} for name, data in images.items()]
    return {
        "folder": storage.join(folder, "loose"),
        "tar": put("images.tar", tar_bytes(images)),
        "tar.gz": put("images.tar.gz", tar_bytes(images, "w:gz")),
        "zip": put("images.zip", zip_bytes(images)),
        "parquet of structs": put("structs.parquet", parquet_bytes({"image": structs})),
        "parquet of bytes": put("bytes.parquet", parquet_bytes({"jpg": list(images.values())})),
        "s3 prefix": storage.join(bucket, "loose"),
        "s3 tar": put("images.tar", tar_bytes(images), bucket),
        "s3 zip": put("images.zip", zip_bytes(images), bucket),
        "s3 parquet": put("structs.parquet", parquet_bytes({"image": structs}), bucket),
        # the same keys as those of the folder, so each is run by itself
        "txt": put("list.txt", "\n".join(loose).encode()),
        "csv": put("list.csv", rows.getvalue().encode()),
        "parquet of uris": put("list.parquet", parquet_bytes({"uri": loose})),
        "glob": storage.join(folder, "loose", "*.jpg"),
    }


SAME_KEYS = ("txt", "csv", "parquet of uris", "glob")


def parquet_bytes(columns: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def instances_by_form(output: str, names: list[str], uris: dict[str, str]) -> dict[str, dict[str, list[Any]]]:
    """Form → image name → its instances."""
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: {name: [] for name in names})
    for row in open_results(output).instances().to_table().to_pylist():
        key = row.pop("image_key")
        row.pop("run")
        form = next(form for form, uri in uris.items() if key.startswith((uri + "/", uri + "#")))
        member = key.removeprefix(uris[form])[1:]
        found[form][names[int(member)] if ".parquet" in key else member].append(row)
    return found


@pytest.fixture
def local_ray(s3_root: str) -> Iterator[str]:
    """Started once the environment names the S3 server, so that actors know it; gives a bucket."""
    yield s3_root
    ray.shutdown()


def check(images: dict[str, bytes], bucket: str, tmp_path: Path, net: model.MaskRCNN) -> None:
    names = list(images)
    weights = tmp_path / "weights.safetensors"
    model.save(net, weights)
    uris = write_inputs(images, str(tmp_path / "archive"), bucket)
    packed = {form: uri for form, uri in uris.items() if form not in SAME_KEYS}
    together = str(tmp_path / "together")
    summary = segment(SegmentConfig(inputs=tuple(packed.values()), output=together, weights=str(weights)))
    assert summary.images_ok == len(names) * len(packed)
    by_form = instances_by_form(together, names, packed)
    expected = by_form["folder"]
    assert sum(map(len, expected.values())) == summary.instances / len(packed) > 0
    for form in packed:
        assert by_form[form] == expected, form
    for form in SAME_KEYS:
        again = segment(SegmentConfig(inputs=(uris[form],), output=together, weights=str(weights)))
        assert (again.images_listed, again.images_planned) == (len(names), 0), form  # the folder's own keys
    on_s3 = storage.join(bucket, "results")
    segment(SegmentConfig(inputs=(uris["txt"],), output=on_s3, weights=str(weights)))
    assert instances_by_form(on_s3, names, {"folder": packed["folder"]})["folder"] == expected


def test_every_form_of_an_archive_gives_the_same_instances(local_ray: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "drawn", num_images=9, seed=3)
    images = {path.name: path.read_bytes() for path in sorted((tmp_path / "drawn").rglob("*.jpg"))}
    check(images, local_ray, tmp_path, small_network())


@pytest.mark.slow
def test_every_form_of_a_hundred_photographs_gives_the_same_instances(local_ray: str, tmp_path: Path) -> None:
    paths = sorted((DATA / "coco100" / "images").glob("*.jpg"))
    if not paths:
        pytest.skip(f"no photographs in {DATA}; set MASKLINE_DATA")
    net = model.random_network(model.R18_FPN(min_size=160, max_size=266), seed=0)
    check({path.name: path.read_bytes() for path in paths}, local_ray, tmp_path, net)

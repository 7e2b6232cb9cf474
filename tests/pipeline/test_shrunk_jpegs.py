"""JPEGs decoded to a part of their sides: which part, beside an average of the whole, turned, cut, and segmented."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import model
import pipeline
from jobs.agreement import agreement
from jobs.segment import describe_table
from jobs.segment_config import SegmentConfig
from model import R18_FPN, Recipe
from model.structures import ImageSize
from model.weights import WeightsInfo
from pipeline import commits
from pipeline.archive import list_images
from pipeline.decode import DecodeLimits, ImageHeader, decode, inspect, shrunk
from pipeline.errors import DecodeError
from pipeline.results import Results, TableMetadata
from pipeline.scenes import draw_scene
from pipeline.segment_actor import SegmentActor
from pipeline.shard_attempts import ActorConfig, Attempt
from pipeline.shards import Plan, ShardConfig
from tests.pipeline.bad_images import encode, encode_jpeg, encode_oriented

LIMITS = DecodeLimits()
METADATA = TableMetadata(weights_name="t", weights_sha256="1", settings_hash="2", settings={}, categories={1: "disc"})


def smooth(size: ImageSize, seed: int = 0) -> Image.Image:
    """Of colours that change slowly: a pixel of a shrunk one is then near the mean of those it stands for."""
    blocks = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size.width, size.height), Image.Resampling.BICUBIC)


def averaged(pixels: NDArray[np.uint8], shrink: int) -> NDArray[np.float64]:
    """The slow way: the mean of each block of the whole, those at the edges filled with their last pixels."""
    height, width, _ = pixels.shape
    padding = ((0, -height % shrink), (0, -width % shrink), (0, 0))
    whole = np.pad(pixels.astype(np.float64), padding, mode="edge")
    blocks = whole.reshape(whole.shape[0] // shrink, shrink, whole.shape[1] // shrink, shrink, 3)
    means: NDArray[np.float64] = blocks.mean(axis=(1, 3))
    return means


def header_of(image_format: str, size: ImageSize, orientation: int = 1) -> ImageHeader:
    return ImageHeader(format=image_format, mode="RGB", size=size, orientation=orientation, is_fast=True)


@pytest.mark.parametrize(
    ("size", "wanted", "shrink"),
    [
        (ImageSize(1200, 1600), ImageSize(600, 800), 2),
        (ImageSize(1200, 1600), ImageSize(601, 800), 1),
        (ImageSize(1200, 1600), ImageSize(300, 400), 4),
        (ImageSize(1200, 1600), ImageSize(150, 200), 8),
        (ImageSize(1200, 1600), ImageSize(1, 1), 8),
        (ImageSize(1200, 1600), ImageSize(2000, 1), 1),
        (ImageSize(1, 1), ImageSize(1, 1), 1),
    ],
)
def test_no_side_becomes_shorter_than_wanted(size: ImageSize, wanted: ImageSize, shrink: int) -> None:
    assert shrunk(header_of("JPEG", size), wanted).shrink == shrink
    turned = header_of("JPEG", ImageSize(size.width, size.height), orientation=6)
    assert shrunk(turned, wanted).shrink == shrink
    assert shrunk(header_of("PNG", size), wanted).shrink == 1


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(8, 90),
    width=st.integers(8, 90),
    shrink=st.sampled_from([2, 4, 8]),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    progressive=st.booleans(),
)
def test_a_shrunk_picture_is_an_average(height: int, width: int, shrink: int, mode: str, progressive: bool) -> None:
    data = encode_jpeg(smooth(ImageSize(height, width)).convert(mode), progressive=progressive)
    header = inspect(data, LIMITS)
    pixels = decode(data, replace(header, shrink=shrink))
    expected = averaged(decode(data, header), shrink)
    assert pixels.shape == expected.shape == (*replace(header, shrink=shrink).decoded_size, 3)
    # Blocks at the edges hold what the encoder put behind the edge.
    inside = (slice(0, height // shrink), slice(0, width // shrink))
    assert np.abs(pixels[inside] - expected[inside]).max() <= 12
    assert np.abs(pixels[inside] - expected[inside]).mean() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied(orientation: int) -> None:
    upright = smooth(ImageSize(64, 96))
    data = encode_oriented(upright, "JPEG", orientation, quality=97, subsampling=0)
    header = shrunk(inspect(data, LIMITS), ImageSize(32, 48))
    assert header.shrink == 2
    expected = averaged(np.asarray(upright), 2)
    assert np.abs(decode(data, header) - expected).max() <= 12


def test_cut_ones_are_truncated_and_whole_ones_are_not() -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (128, 160, 3), dtype=np.uint8))
    data = encode(noise, "JPEG", quality=90)
    header = replace(inspect(data, LIMITS), shrink=4)
    assert decode(data, header).shape == (32, 40, 3)
    for end in range(len(data) // 2, len(data) - 2, 997):
        for closing in (b"", b"\xff\xd9"):
            with pytest.raises(DecodeError) as caught:
                decode(data[:end] + closing, header)
            assert caught.value.reason == "truncated"


def test_detections_lie_in_the_frame_of_the_whole_image() -> None:
    net = model.load("demo")
    pixels = draw_scene(7, ImageSize(1920, 2560)).image
    data = encode_jpeg(Image.fromarray(pixels))
    header = inspect(data, LIMITS)
    small = decode(data, shrunk(header, net.padded_size(header.oriented_size)))
    assert small.shape == (480, 640, 3)
    (found,) = net.encode(net.detect([small], 0.5, sizes=[header.oriented_size]), 0.5)
    (whole,) = net.predict([decode(data, header)], 0.5)
    assert found.size == whole.size == (1920, 2560)
    assert found.masks[0]["size"] == [1920, 2560]
    assert len(whole) > 3
    agreed = agreement([found], [whole])
    assert agreed.matched > 0.8
    assert agreed.mask_iou > 0.8


def test_normal_and_suspect_attempts_shrink_alike(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    for seed in range(3):
        scene = draw_scene(seed, ImageSize(960, 1280))
        (archive / f"{seed}.jpg").write_bytes(encode_jpeg(Image.fromarray(scene.image)))
    whole, shrunk_, suspect = (
        _segmented(archive, tmp_path / f"{shrink}-{suspect}", shrink=shrink, suspect=suspect)
        for shrink, suspect in ((False, False), (True, False), (True, True))
    )
    assert shrunk_.equals(suspect)
    assert shrunk_["mask_height"].unique().to_pylist() == [960]
    assert len(shrunk_) == pytest.approx(len(whole), abs=3)
    assert not shrunk_["x1"].equals(whole["x1"])


def test_shrunk_rows_are_rows_of_other_settings() -> None:
    info = WeightsInfo(name="demo", sha256="1", config=R18_FPN(), recipe=Recipe(), categories={1: "disc"})
    plain = SegmentConfig(inputs=("a",), output="b", weights="demo")
    tables = [describe_table(config, info, "fp32") for config in (plain, replace(plain, shrink_jpegs=True))]
    assert tables[0].settings_hash != tables[1].settings_hash
    assert "shrink_jpegs" not in tables[0].settings  # tables of before the option was there are resumed as they were


def _segmented(archive: Path, output: Path, *, shrink: bool, suspect: bool) -> pa.Table:
    plan = Plan(
        list_images([str(archive)]),
        Results(str(output), []),
        weights_sha256="1",
        settings_hash="2",
        config=ShardConfig(),
    )
    commits.create_table(str(output))
    config = ActorConfig(output=str(output), run_id="r", score_threshold=0.5, metadata=METADATA, shrink_jpegs=shrink)
    actor = SegmentActor(lambda: model.load("demo"), config)
    actor.ready()
    with plan:
        for shard in plan.shards():
            actor.segment(shard, Attempt(attempt_id="a", urgency=0, suspect=suspect))
    images = pipeline.open_results(str(output)).images().to_table()
    assert images["height"].unique().to_pylist() == [960]
    return pipeline.open_results(str(output)).instances().to_table().drop_columns(["run"])

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

import model
from jobs.proposals import ProposalsConfig, write_proposals
from pipeline.errors import ConfigError
from pipeline.scenes import draw_scene


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(2):
        Image.fromarray(draw_scene(seed, model.ImageSize(120, 160)).image).save(folder / f"{seed}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_every_image_has_its_row_and_most_objects_a_proposal(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "proposals.parquet"
    assert write_proposals(ProposalsConfig(inputs=(str(folder),), output=output, max_proposals=500)) == 3
    rows = {Path(row["image_key"]).name: row for row in pq.read_table(output).to_pylist()}
    assert rows["broken.png"]["boxes"] is None
    assert rows["broken.png"]["error"]
    overlaps = []
    for seed in range(2):
        boxes = np.array(rows[f"{seed}.png"]["boxes"]).reshape(-1, 4)
        assert 0 < len(boxes) <= 500
        assert (boxes >= 0).all()
        assert (boxes <= (160, 120, 160, 120)).all()
        for mask in draw_scene(seed, model.ImageSize(120, 160)).masks:
            y, x = mask.nonzero()
            overlaps.append(_overlaps(boxes, [x.min(), y.min(), x.max() + 1, y.max() + 1]).max())
    assert np.mean(np.array(overlaps) > 0.5) > 0.7


def _overlaps(boxes: NDArray[np.float64], box: list[int]) -> NDArray[np.float64]:
    """IoU of each of (P, 4) with one."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = (high - low).clip(0).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2] - box[0]) * (box[3] - box[1]) - shared
    return np.asarray(shared / union)


def test_a_fast_r_cnn_takes_them(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "proposals.parquet"
    write_proposals(ProposalsConfig(inputs=(str(folder / "0.png"),), output=output, max_proposals=100))
    (row,) = pq.read_table(output).to_pylist()
    config = replace(model.R18_FPN(num_classes=3, min_size=96, max_size=160), proposals="given", mask_head="none")
    image = draw_scene(0, model.ImageSize(120, 160)).image
    net = model.random_network(config, seed=0, image=image)
    proposals = np.array(row["boxes"], np.float32).reshape(-1, 4)
    assert len(net.predict([image], 0.1, proposals=[proposals])[0])


def test_a_file_that_exists_is_kept(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "proposals.parquet"
    output.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists"):
        write_proposals(ProposalsConfig(inputs=(str(folder),), output=output))
    assert output.read_bytes() == b"mine"

"""The weights that come with maskline find what they were trained to find, in images they have not seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

import model
from model import ImageSize
from pipeline.scenes import CATEGORIES, draw_scene
from tests.model.conftest import DATA, read_image
from tests.reference.average_precision import average_precision

LARGEST_FILE = 16 * 2**20
"""Bytes."""
NUCLEI = DATA / "nuclei"


@pytest.mark.parametrize("name", ["demo", "nuclei"])
def test_files_are_small(name: str) -> None:
    path = Path(model.weights.__file__).parent / "shipped" / f"{name}.safetensors"
    assert path.stat().st_size <= LARGEST_FILE
    assert model.load(name).name == name


def test_demo_finds_the_objects_of_drawn_scenes() -> None:
    scenes = [draw_scene(seed, ImageSize(240, 320)) for seed in range(900, 906)]
    net = model.load("demo")
    assert list(net.categories.values()) == list(CATEGORIES)
    found = net.predict([scene.image for scene in scenes])
    truth = [(scene.masks, scene.category_ids) for scene in scenes]
    assert average_precision(truth, found, list(CATEGORIES)) >= 0.75


@pytest.mark.skipif(not NUCLEI.exists(), reason="nuclei is not beside the repository: set MASKLINE_DATA")
def test_nuclei_finds_nuclei_it_was_not_trained_on() -> None:
    dataset = json.loads((NUCLEI / "instances_val.json").read_text())
    truth, images = [], []
    for image in dataset["images"][:4]:
        shapes = [one["segmentation"] for one in dataset["annotations"] if one["image_id"] == image["id"]]
        encoded = [{**shape, "counts": shape["counts"].encode()} for shape in shapes]
        masks = np.array([coco_mask.decode(shape) for shape in encoded], dtype=bool)
        truth.append((masks, np.ones(len(masks), dtype=np.int64)))
        images.append(read_image(NUCLEI / "images" / image["file_name"]))
    assert average_precision(truth, model.load("nuclei").predict(images), ["nucleus"]) >= 0.6

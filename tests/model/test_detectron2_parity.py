"""Our networks beside detectron2's own, where detectron2 is installed: an image enters both, the answers are one."""

from __future__ import annotations

import os
import sys

import pytest

import model
from jobs.detectron2_peer import CONFIGS, detectron2_network, predict, published
from tests.model.conftest import coco_paths, read_image
from tests.reference import parity

pytest.importorskip("detectron2")

BOX_TOLERANCE = 0.1
"""Pixels."""
NUM_IMAGES = int(os.environ.get("MASKLINE_PARITY_IMAGES", "3"))
"""Of the 100, evenly spread."""

needs_coco = pytest.mark.skipif(not coco_paths(), reason="coco100 is not beside the repository: set MASKLINE_DATA")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what detectron2 warns of is not ours to mend
@needs_coco
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_agrees_with_detectron2(kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "BOX_TOLERANCE", BOX_TOLERANCE)
    paths = coco_paths()
    picked = [paths[index * len(paths) // NUM_IMAGES] for index in range(NUM_IMAGES)]
    images = {path.name: read_image(path) for path in picked}
    theirs = detectron2_network(kind, next(iter(images.values())))
    ours = model.load(published(theirs), name="model_final.pkl")
    worst, outside, num_detections = parity.Difference(), {}, 0
    for name, image in images.items():
        expected = predict(theirs, image)
        assert len(expected["labels"]) > 0, name
        num_detections += len(expected["labels"])
        difference = parity.compare(ours.predict([image])[0], expected)
        worst = worst.worst(difference)
        if not difference.is_within():
            outside[name] = difference
    with capsys.disabled():
        found = f"{len(images)} images, {num_detections} detections, {len(outside)} outside the tolerances"
        sys.stdout.write(f"\n{kind}: {found}, worst {worst}\n")
    assert not outside

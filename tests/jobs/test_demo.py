from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.jobs.test_segment import maskline


def test_the_demo_draws_segments_and_shows_and_the_second_run_finds_it_done(tmp_path: Path) -> None:
    arguments = ("demo", "--folder", tmp_path / "demo", "--num-images", 6, "--num-overlays", 3)
    first = maskline(*arguments)
    assert first.returncode == 0, first.stderr
    assert "6 ok, 0 failed" in first.stdout
    assert "weights: demo, trained on scenes like these" in first.stdout
    overlays = sorted((tmp_path / "demo" / "overlays").glob("0*.png"))
    assert len(overlays) == 3
    assert np.asarray(Image.open(overlays[0])).std() > 0
    second = maskline(*arguments)
    assert second.returncode == 0, second.stderr
    assert "6 images listed, 6 already done, 0 to do" in second.stderr

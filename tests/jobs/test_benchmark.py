from __future__ import annotations

import pytest

from tests.jobs.test_segment import last_json, maskline

pytestmark = pytest.mark.slow


def test_the_pipeline_part_measures_all_three_systems() -> None:
    run = maskline("benchmark", "--parts", "pipeline", "--num-images", 60, "--repeats", 1, "--json")
    found = last_json(run)
    systems = {row["system"]: row["images_per_second"] for row in found["rows"]}
    ours = systems.pop("maskline")
    assert found["pipeline_vs_ray_data"] == ours / systems["ray data, read_images"]
    assert found["pipeline_vs_best_ray_data"] == ours / systems["ray data, read_binary_files"]
    assert all(row["images"] == 60 and len(row["seconds"]) == 1 for row in found["rows"])


def test_the_train_part_measures_all_three_systems() -> None:
    run = maskline("benchmark", "--parts", "train", "--train-steps", 5, "--repeats", 1, "--device", "cpu", "--json")
    found = last_json(run)
    systems = {row["system"]: row["images_per_second"] for row in found["rows"]}
    ours = systems.pop("maskline")
    assert found["train_vs_bare_step"] == ours / systems["bare step"]
    assert found["train_vs_torchvision"] == ours / systems["torchvision"]
    assert all(row["images"] == 2 * 8 for row in found["rows"])  # the first three steps do not count

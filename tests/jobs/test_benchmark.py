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


def test_the_parts_that_train_measure_both_systems() -> None:
    options = ("--train-steps", 5, "--repeats", 1, "--device", "cpu", "--json")
    found = last_json(maskline("benchmark", "--parts", "train", "step", *options))
    rates = {(row["part"], row["system"]): row["images_per_second"] for row in found["rows"]}
    assert found["step_vs_torchvision"] == rates["step", "maskline"] / rates["step", "torchvision"]
    assert found["train_vs_bare_step"] == rates["train", "maskline"] / rates["step", "maskline"]
    assert found["train_vs_torchvision"] == rates["train", "maskline"] / rates["train", "torchvision"]
    assert all(row["images"] == 2 * 8 for row in found["rows"])  # the first three steps do not count

"""The model part of the benchmark on small inputs: every system measured, told by stages, and in agreement."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.model_benchmark import ModelRow, measure_model, measure_untuned, product_tflops
from jobs.model_systems import REFERENCE, UNTUNED, ModelBenchmark, Peer
from jobs.model_tables import model_ratios, model_table, speed_picture, stage_table
from jobs.stage_times import StageClock
from model.stages import STAGES

BFLOAT16 = "maskline, bf16"
FLOAT32 = "maskline, float32"
EXACT = "maskline, float32, exact"
AUTOCAST = "torchvision, autocast bf16"
SYSTEMS = (REFERENCE, AUTOCAST, FLOAT32, BFLOAT16, EXACT)


@pytest.fixture(scope="module")
def rows() -> list[ModelRow]:
    return measure_model(_benchmark("eager", "bf16"), _noise)


def _benchmark(*peers: Peer) -> ModelBenchmark:
    return ModelBenchmark(
        paths=[Path("0")],
        device=torch.device("cpu"),
        batch_size=1,
        repeats=1,
        peers=peers,
        min_size=128,
        max_size=256,
    )


def _noise(path: Path) -> NDArray[np.uint8]:
    blocks = np.random.default_rng(int(path.name)).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blocks).resize((160, 120), Image.Resampling.BICUBIC))


def test_each_setting_has_each_system(rows: list[ModelRow]) -> None:
    assert [(row.setting, row.system) for row in rows] == [
        (setting, system) for setting in ("many", "few") for system in SYSTEMS
    ]
    many, few = rows[0], rows[len(SYSTEMS)]
    assert many.detections > 50
    assert 5 <= few.detections <= 20
    assert all(row.images_per_second == pytest.approx(1 / row.seconds[0]) for row in rows)


def test_float32_agrees(rows: list[ModelRow]) -> None:
    for row in rows:
        if row.system in (REFERENCE, FLOAT32, EXACT):
            assert row.agreement.matched == 1.0
            assert row.agreement.box < (0.01 if row.system == FLOAT32 else 1e-3)
            assert row.agreement.mask_iou > 0.99
    assert rows[0].agreement.detections == rows[0].detections


def test_every_system_tells_every_stage(rows: list[ModelRow]) -> None:
    for row in rows:
        assert set(row.stage_milliseconds) == set(STAGES)
        assert all(milliseconds > 0 for milliseconds in row.stage_milliseconds.values()), row


def test_a_clock_gives_each_stage_the_time_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 15.0, 20.0, 20.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = StageClock(torch.device("cpu"))
    clock.start()
    clock.after("proposals")
    clock.after("mask head")
    clock.start()  # what lies between is no stage's
    clock.after("mask head")
    assert {stage: seconds for stage, seconds in clock.seconds.items() if seconds} == {
        "proposals": 1.0,
        "mask head": 4.5,
    }


def test_work_is_counted(rows: list[ModelRow]) -> None:
    many, few = rows[0], rows[len(SYSTEMS)]
    assert many.tflops / many.images_per_second > few.tflops / few.images_per_second  # of more masks
    assert all(row.of_product > 0 and row.peak_bytes > 2e8 for row in rows)
    assert product_tflops(torch.device("cpu"), torch.float32) > 1e-3


def test_what_is_shown(rows: list[ModelRow]) -> None:
    ratios = model_ratios(rows)
    assert ratios["model_fp32_vs_torchvision"] == rows[2].images_per_second / rows[0].images_per_second
    ours = max(row.images_per_second for row in rows[2:5])
    assert ratios["model_vs_best_torchvision"] == ours / max(row.images_per_second for row in rows[:2])
    assert "model_vs_untuned_torchvision" not in ratios
    assert model_table(rows).row_count == len(rows)
    assert stage_table(rows).row_count == len(STAGES) + 1
    with Image.open(io.BytesIO(speed_picture(rows, "a machine"))) as picture:
        assert picture.width > 600


def test_torchvision_as_its_users_have_it(rows: list[ModelRow]) -> None:
    untuned = measure_untuned(_benchmark("untuned"), _noise)
    assert {row.system for row in untuned} == {REFERENCE + UNTUNED}
    assert [row.setting for row in untuned] == ["many", "few"]
    together = rows + untuned
    ratios = model_ratios(together)
    assert ratios["model_fp32_vs_untuned_torchvision"] == rows[2].images_per_second / untuned[0].images_per_second
    assert ratios["model_vs_untuned_torchvision"] == ratios["model_vs_best_untuned_torchvision"]
    assert ratios.items() >= model_ratios(rows).items()  # its rows change no other ratio
    assert model_table(together).row_count == len(together)

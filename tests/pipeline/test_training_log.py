"""Records of a training run: kept exactly, said in one line, judged without false alarm, read as TensorBoard does."""

from __future__ import annotations

import io
import struct
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline import storage, training_log
from pipeline.training_log import (
    EvaluationRecord,
    History,
    StepRecord,
    TensorBoardLog,
    evaluation_line,
    step_line,
    warnings_of,
)

STEP = StepRecord(
    step=119,
    epoch=1.2,
    losses={"rpn_objectness": 0.21, "rpn_box": 0.11, "class": 0.5, "box": 0.25, "mask": 0.164},
    learning_rate=0.01,
    grad_norm=3.5,
    images=16,
    seconds=1.3,
    data_seconds=0.026,
    memory_bytes=3 * 2**29,
)
EVALUATION = EvaluationRecord(step=119, epoch=1.2, scores={"segm AP": 0.41, "bbox AP50": 0.6125})


def history_of(
    losses: NDArray[np.float64],
    *,
    grad_norms: NDArray[np.float64] | None = None,
    data_seconds: NDArray[np.float64] | None = None,
) -> History:
    """Steps of one second each, at a learning rate of 0.1."""
    norms = np.full(len(losses), 3.0) if grad_norms is None else grad_norms
    waits = np.full(len(losses), 0.02) if data_seconds is None else data_seconds
    return History(
        steps=[
            replace(
                STEP,
                step=step,
                losses={"class": loss},
                learning_rate=0.1,
                grad_norm=norm,
                seconds=1.0,
                data_seconds=wait,
            )
            for step, (loss, norm, wait) in enumerate(zip(losses.tolist(), norms.tolist(), waits.tolist(), strict=True))
        ]
    )


def noise(num_steps: int, *, seed: int = 0, sigma: float = 0.3) -> NDArray[np.float64]:
    """(S,) factors around 1."""
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(num_steps))


def test_json_lines_are_read_back_exactly_and_lie_in_order() -> None:
    history = History()
    for step in range(5):
        history.add(replace(STEP, step=step, losses={"class": 0.1 + 1 / 3 * step}, unreadable=step))
        if step % 2:
            history.add(replace(EVALUATION, step=step))
    data = history.to_json_lines()
    assert History.from_json_lines(data) == history
    kinds = ["evaluation" if b'"kind": "evaluation"' in line else "step" for line in data.splitlines()]
    assert kinds == ["step", "step", "evaluation", "step", "step", "evaluation", "step"]
    assert History.from_json_lines(b"") == History()
    assert History().to_json_lines() == b""


def test_a_line_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="line 2 of a training history is of kind 'epoch'"):
        History.from_json_lines(History(steps=[STEP]).to_json_lines() + b'{"kind": "epoch"}\n')


def test_cut_drops_what_is_done_again_and_the_run_goes_on() -> None:
    history = history_of(np.ones(10))
    for step in (3, 6, 9):
        history.add(replace(EVALUATION, step=step))
    with pytest.raises(ValueError, match=r"step 6 comes after step 9; cut\(6\)"):
        history.add(replace(STEP, step=6))
    history.cut(6)
    assert [record.step for record in history.steps] == [0, 1, 2, 3, 4, 5]
    assert [record.step for record in history.evaluations] == [3]
    history.add(replace(STEP, step=6))
    history.add(replace(EVALUATION, step=6))
    assert (len(history.steps), len(history.evaluations)) == (7, 2)


def test_the_line_of_one_step() -> None:
    # 0.21 + 0.11 + 0.5 + 0.25 + 0.164 = 1.234; 16 / 1.3 = 12.3; 0.026 / 1.3 = 2 %; 1,880 steps of 1.3 s = 2,444 s.
    assert step_line([STEP], num_steps=2000) == (
        "step 120/2000  epoch 1.2  loss 1.234 (rpn_objectness 0.21 rpn_box 0.11 class 0.50 box 0.25 mask 0.16)"
        "  lr 0.0100  12.3 img/s  data 2 %  ETA 40m 44s  1.5 GiB"
    )


def test_a_line_averages_its_steps_and_counts_unreadable_images() -> None:
    first = replace(STEP, step=8, losses={"class": 1.0}, images=16, seconds=1.0, data_seconds=1.0, unreadable=2)
    last = replace(STEP, step=9, losses={"class": 3.0}, learning_rate=2.5e-5, images=8, seconds=5.0, data_seconds=0.5)
    # 24 images in 6 s; 1.5 of 6 s waited; the 10 steps left take 3 s each.
    assert step_line([first, replace(last, unreadable=1, memory_bytes=2**20)], num_steps=20) == (
        "step 10/20  epoch 1.2  loss 2.000 (class 2.0)  lr 2.50e-05  4.00 img/s  data 25 %  ETA 30s  1.5 GiB"
        "  3 unreadable"
    )
    with pytest.raises(ValueError, match="at least one record"):
        step_line([], num_steps=20)


@pytest.mark.parametrize(
    ("steps_left", "seconds", "eta"),
    [(0, 3.0, "0s"), (59, 1.0, "59s"), (190, 1.0, "3m 10s"), (3660, 1.0, "1h 01m"), (1000, 180.0, "50h 00m")],
)
def test_the_eta_is_the_steps_left_at_the_mean_time(steps_left: int, seconds: float, eta: str) -> None:
    records = [replace(STEP, step=4, seconds=0.5 * seconds), replace(STEP, step=5, seconds=1.5 * seconds)]
    assert f"  ETA {eta}  " in step_line(records, num_steps=6 + steps_left)


def test_lines_of_long_and_broken_runs_stay_short() -> None:
    huge = dict.fromkeys(STEP.losses, 123456.789)
    line = step_line([replace(STEP, step=269_998, epoch=36.8, losses=huge, images=512)], num_steps=270_000)
    assert len(line) < 200
    broken = replace(STEP, losses={"class": float("nan"), "box": float("inf")}, grad_norm=float("nan"))
    assert "loss nan (class nan box inf)" in step_line([broken], num_steps=2000)


def test_the_line_of_an_evaluation() -> None:
    assert evaluation_line(EVALUATION) == "evaluation after step 120  epoch 1.2  segm AP 0.410  bbox AP50 0.613"


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.4])
def test_a_healthy_run_gets_no_warning_at_any_time(sigma: float) -> None:
    step = np.arange(500)
    for seed in range(4):
        losses = (3 * np.exp(-step / 100) + 0.5) * noise(500, seed=seed, sigma=sigma)
        norms = (8 * np.exp(-step / 50) + 2) * noise(500, seed=seed + 10, sigma=2 * sigma)
        waits = np.where(step % 25 == 0, 1.0, 0.05)  # the loader starts anew now and then
        history = history_of(losses, grad_norms=norms, data_seconds=waits)
        for length in range(0, 501, 20):
            assert warnings_of(History(steps=history.steps[:length])) == []


def test_a_loss_that_dips_before_the_first_objects_are_found_is_healthy() -> None:
    losses = np.concatenate([np.full(15, 3.0), np.full(30, 0.7), np.linspace(0.7, 1.6, 30), np.full(60, 1.5)])
    for length in range(len(losses)):
        assert warnings_of(history_of(losses[:length])) == []


def test_a_diverging_loss_is_told_with_the_learning_rate_to_try() -> None:
    losses = np.concatenate([np.full(100, 1.2), np.linspace(1.2, 9.8, 40), np.full(10, 9.8)])
    # Of the blocks of ten that are equally low, the last counts: steps 90 to 99.
    [warning] = warnings_of(history_of(losses))
    assert warning == (
        "the loss has risen from 1.2 to 9.8 over the last 60 steps: the learning rate 0.1 is likely too high; try 0.03"
    )
    noisy = losses * noise(len(losses), sigma=0.2)
    assert "the loss has risen" in warnings_of(history_of(noisy))[0]
    assert warnings_of(history_of(noisy[:100])) == []
    from_the_start = 3 * np.exp(np.arange(30) / 8)
    assert "the loss has risen" in warnings_of(history_of(from_the_start))[0]


def test_one_wild_step_is_no_divergence() -> None:
    losses = np.full(100, 1.0)
    losses[[60, 97, 99]] = 1e6
    norms = np.full(100, 3.0)
    norms[[60, 97, 99]] = float("inf")
    assert warnings_of(history_of(losses, grad_norms=norms)) == []


def test_a_loss_that_stands_still_is_told_after_two_hundred_steps() -> None:
    losses = 3 * noise(300, sigma=0.1)
    assert warnings_of(history_of(losses[:199])) == []
    [warning] = warnings_of(history_of(losses))
    assert "the loss has not fallen in 300 steps" in warning
    assert warnings_of(history_of(np.concatenate([losses[:100], 0.8 * losses[100:]]))) == []


def test_an_exploding_gradient_is_told_and_a_rise_from_nothing_is_not() -> None:
    losses = np.linspace(3, 1, 100)
    norms = np.concatenate([np.full(80, 2.0), np.full(20, 50.0)])
    [warning] = warnings_of(history_of(losses, grad_norms=norms))
    assert warning == ("the gradient norm has risen from 2.0 to 50: clip it, or try a lower learning rate than 0.1")
    assert warnings_of(history_of(losses, grad_norms=norms / 10)) == []  # 5 is harmless
    assert warnings_of(history_of(losses, grad_norms=np.where(norms > 2, 38.0, 2.0))) == []  # less than twentyfold


def test_a_starving_accelerator_is_told() -> None:
    losses = np.linspace(3, 1, 100)
    waits = np.where(np.arange(100) % 5 == 0, 1.0, 0.1)  # of each five seconds 1.4, while the median step waits 0.1
    [warning] = warnings_of(history_of(losses, data_seconds=waits))
    # The last 50 without their longest wait: 9 · 1 + 40 · 0.1 of 49 s.
    assert warning == (
        "the loader is slow: 27 % of the last 50 steps was spent waiting for images; raise --loader-processes"
    )
    assert warnings_of(history_of(losses[:20], data_seconds=waits[:20])) == []
    once = np.where(np.arange(100) == 80, 1.0, 0.19)
    assert warnings_of(history_of(losses, data_seconds=once)) == []


def masked_checksum(data: bytes) -> int:
    """CRC-32C bit by bit, masked as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events_of(data: bytes) -> Iterator[Any]:
    from tensorboardX.proto.event_pb2 import Event

    file = io.BytesIO(data)
    while header := file.read(12):
        length, length_checksum = struct.unpack("<QI", header)
        payload, [checksum] = file.read(length), struct.unpack("<I", file.read(4))
        assert length_checksum == masked_checksum(header[:8])
        assert checksum == masked_checksum(payload)
        yield Event.FromString(payload)


def event_files(output_uri: str) -> list[list[Any]]:
    """The events of each file, the files in the order in which TensorBoard reads them."""
    found = sorted(info.uri for info in storage.list_files(storage.join(output_uri, "tensorboard")))
    assert all("tfevents" in uri for uri in found)
    return [list(events_of(storage.read_bytes(uri))) for uri in found]


@pytest.fixture(params=["local", "memory"])
def output_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def test_tensorboard_reads_what_was_logged_after_each_flush(output_uri: str) -> None:
    log = TensorBoardLog(output_uri)
    log.add(STEP)
    log.flush()
    [[version, step]] = event_files(output_uri)
    assert version.file_version == "brain.Event:2"
    assert step.step == 119
    values = {value.tag: value.simple_value for value in step.summary.value}
    assert values == pytest.approx(
        {f"loss/{name}": loss for name, loss in STEP.losses.items()}
        | {
            "loss/total": 1.234,
            "optimiser/learning_rate": 0.01,
            "optimiser/grad_norm": 3.5,
            "speed/images_per_second": 16 / 1.3,
            "speed/data_share": 0.02,
            "speed/memory_gib": 1.5,
        }
    )
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(picture, "PNG")
    log.add(EVALUATION)
    log.add_image("predictions", picture.getvalue(), 119)
    log.close()
    [[_, _, evaluation, image]] = event_files(output_uri)
    assert {value.tag: value.simple_value for value in evaluation.summary.value} == pytest.approx(
        {"score/segm AP": 0.41, "score/bbox AP50": 0.6125}
    )
    [value] = image.summary.value
    assert (value.tag, value.image.width, value.image.height, image.step) == ("predictions", 30, 20, 119)
    assert value.image.encoded_image_string == picture.getvalue()


def test_a_resumed_run_hides_the_steps_it_does_again(output_uri: str) -> None:
    from tensorboardX.proto.event_pb2 import SessionLog

    first = TensorBoardLog(output_uri)
    for step in (0, 1, 2):
        first.add(replace(STEP, step=step))
    first.close()
    resumed = TensorBoardLog(output_uri, purge_step=1)
    resumed.add(replace(STEP, step=1))
    resumed.close()
    old, [version, start, step] = event_files(output_uri)
    assert [event.step for event in old[1:]] == [0, 1, 2]
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (1, SessionLog.START)
    assert step.step == 1


def test_a_long_run_fills_several_files_and_writes_none_for_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training_log, "_EVENT_FILE_BYTES", 1000)
    log = TensorBoardLog(str(tmp_path))
    log.close()
    assert not list(tmp_path.iterdir())
    for step in range(10):
        log.add(replace(STEP, step=step))
        log.flush()
    log.close()
    files = event_files(str(tmp_path))
    assert len(files) > 2
    assert [event.step for events in files for event in events if event.HasField("summary")] == list(range(10))

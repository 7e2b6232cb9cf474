"""maskline segment as a user runs it: the command, real weights' layout, a real local Ray."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from pycocotools import mask as coco_mask

import model
from jobs import command
from jobs.segment import _warn_of_missing_kernel, main
from jobs.segment_config import SegmentConfig
from pipeline.results import open_results
from pipeline.scenes import write_archive
from tests.conftest import new_root
from tests.jobs.conftest import FEW_PROPOSALS, small_network
from tests.pipeline.bad_images import make_bad_images
from tests.pipeline.s3_server import FaultyProxy


def maskline(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def last_json(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model.save(small_network(), path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    write_archive(folder, num_images=18, seed=0)
    return folder


@pytest.fixture(scope="module")
def table(archive: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("results") / "out"
    run = maskline("segment", archive, "--output", output, "--weights", weights, "--images-per-shard", 5, "--json")
    return output, last_json(run)


def test_every_image_has_its_row_and_every_mask_its_size(table: tuple[Path, dict[str, Any]]) -> None:
    output, summary = table
    results = open_results(str(output))
    images, instances = results.images().to_table().to_pylist(), results.instances().to_table().to_pylist()
    assert len(images) == len({row["image_key"] for row in images}) == 18 == summary["images_ok"]
    assert sum(row["num_instances"] for row in images) == len(instances) == summary["instances"] > 0
    assert (summary["images_planned"], summary["images_failed"], summary["shards_committed"]) == (18, 0, 4)
    assert any(".tar#" in row["image_key"] for row in images)
    sizes = {row["image_key"]: (row["height"], row["width"]) for row in images}
    for row in instances:
        mask = coco_mask.decode({"size": [row["mask_height"], row["mask_width"]], "counts": row["mask_rle"].encode()})
        assert mask.shape == sizes[row["image_key"]]
        assert mask.sum() == row["area"]
        assert row["score"] >= 0.5
    assert json.loads((output / "_runs" / f"{summary['run_id']}.json").read_text())["instances"] == len(instances)


def test_the_run_has_its_page(table: tuple[Path, dict[str, Any]]) -> None:
    output, summary = table
    page = Path(summary["report"]).read_text()
    assert Path(summary["report"]).parent == output / "_runs"
    assert f"<b>{summary['images_ok']}</b>images ok" in page
    assert page.count("data:image/jpeg") > 3
    again = maskline("report", output)
    assert again.stdout.strip() == summary["report"]
    assert Path(summary["report"]).read_text() == page
    assert "its runs are" in maskline("report", output, "--run", "r9").stderr


def test_the_table_holds_what_predict_finds(table: tuple[Path, dict[str, Any]], archive: Path, weights: Path) -> None:
    from pipeline import decode

    output, _ = table
    net = model.load(weights)
    path = sorted(archive.rglob("*.jpg"))[0]
    data = path.read_bytes()
    pixels = decode.decode(data, decode.inspect(data, decode.DecodeLimits()))
    (expected,) = net.predict([pixels], score_threshold=0.5)
    rows = open_results(str(output)).instances().to_table().to_pylist()
    found = [row for row in rows if row["image_key"] == str(path)]
    assert [row["category_id"] for row in found] == expected.category_ids.tolist()
    np.testing.assert_allclose([row["score"] for row in found], expected.scores, atol=1e-5)
    np.testing.assert_allclose(
        np.array([[row[name] for name in ("x1", "y1", "x2", "y2")] for row in found]).reshape(-1, 4),
        expected.boxes,
        atol=1e-3,
    )


def test_the_same_command_again_plans_nothing_and_new_images_only_add(
    table: tuple[Path, dict[str, Any]], archive: Path, weights: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(table[0], tmp_path / "out")
    grown = shutil.copytree(archive, tmp_path / "grown")
    arguments = ("--output", output, "--weights", weights, "--images-per-shard", 5, "--json")
    again = last_json(maskline("segment", archive, *arguments))
    assert (again["images_planned"], again["images_already_done"]) == (0, 18)
    for path in sorted(archive.rglob("*.jpg"))[:3]:
        shutil.copy(path, grown / f"new-{path.name}")
    more = last_json(maskline("segment", archive, *sorted(grown.glob("new-*")), *arguments))
    assert (more["images_planned"], more["images_ok"]) == (3, 3)
    assert open_results(str(output)).images().count_rows() == 21


def test_a_dry_run_shows_the_plan_and_writes_nothing(archive: Path, weights: Path, tmp_path: Path) -> None:
    run = maskline("segment", archive, "--output", tmp_path / "out", "--weights", weights, "--dry-run", "--json")
    assert last_json(run)["images_planned"] == 18
    assert "18 images listed, 0 already done, 18 to do" in run.stderr
    assert not (tmp_path / "out").exists()


def test_bad_files_leave_rows_with_their_reasons(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    expected = make_bad_images(tmp_path / "bad")
    run = maskline("segment", str(tmp_path / "bad" / "*"), "--output", tmp_path / "out", "--weights", weights, "--json")
    summary = last_json(run)
    rows = open_results(str(tmp_path / "out")).images().to_table().to_pylist()
    found = {Path(row["image_key"]).name: (row["status"], row["reason"]) for row in rows}
    assert found == {name: (status, reason) for name, (status, reason, _) in expected.items()}
    assert summary["images_failed"] == sum(status == "failed" for status, _ in found.values())
    for row in rows:
        size = expected[Path(row["image_key"]).name][2]
        if row["status"] == "ok" and size is not None:
            assert (row["height"], row["width"]) == tuple(size)


def test_sigterm_ends_as_resumable_and_the_same_command_does_the_rest(
    archive: Path, weights: Path, tmp_path: Path
) -> None:
    """Two actors without a word about CPUs share the node."""
    arguments = [
        *("segment", str(archive), "--output", str(tmp_path / "out"), "--weights", str(weights)),
        *("--images-per-shard", "1", "--actors", "2", "--json"),
    ]
    run = subprocess.Popen(
        [sys.executable, "-m", "jobs", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out" / "_commits").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    output, errors = run.communicate(timeout=120)
    summary = json.loads(output.splitlines()[-1])
    done = open_results(str(tmp_path / "out")).images().count_rows()
    assert 0 < done == summary["images_ok"] < 18, "it was to be stopped in the middle"
    assert run.returncode == 1
    assert summary["stopped"]
    assert "the same command does the rest" in errors
    assert last_json(maskline(*arguments))["images_planned"] == 18 - done
    assert open_results(str(tmp_path / "out")).images().count_rows() == 18


def test_a_run_that_hangs_after_sigterm_says_where_and_ends() -> None:
    script = (
        "import os, signal, time\nfrom jobs import segment\n"
        "segment.STOP_SECONDS = 0.5 - segment.ScheduleConfig.grace_seconds\n"
        "with segment._stop_on_signal():\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=50)
    assert run.returncode == 1
    assert 'File "<string>", line 6 in <module>' in run.stderr
    ended = subprocess.run(
        [sys.executable, "-c", script.replace("sleep(60)", "sleep(0)") + "time.sleep(1)"], check=False, timeout=50
    )
    assert ended.returncode == 0, "what ended in time is let go"


def test_sql_answers_and_refuses_in_words(table: tuple[Path, dict[str, Any]]) -> None:
    run = maskline("sql", table[0], "SELECT status, count(*) AS n FROM images GROUP BY 1", "--json")
    assert last_json(run) == {"status": "ok", "n": 18}
    for query in ("SELECT nonsense FROM images", "SELECT cast(image_key AS int) FROM images", ""):
        refused = maskline("sql", table[0], query)
        assert refused.returncode == 2
        assert "the query" in refused.stderr


def test_sql_prints_keys_as_they_are(archive: Path, weights: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a[bold]b"
    odd.mkdir()
    shutil.copy(next(archive.rglob("*.jpg")), odd / "[old].jpg")
    maskline("segment", odd / "[old].jpg", "--output", tmp_path / "out", "--weights", weights)
    printed = maskline("sql", tmp_path / "out", "SELECT right(image_key, 20) AS key FROM images").stdout
    assert "a[bold]b/[old].jpg" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--output", "OUT", "--weights", "WEIGHTS"), "nowhere"),
        (("ARCHIVE", "--output", "OUT", "--weights", "missing.pth"), "no weights at missing.pth"),
        (("ARCHIVE", "--output", "OUT", "--weights", "ARCHIVE/README.txt"), "README.txt"),
        (("ARCHIVE", "--output", "OUT", "--weights", "ARCHIVE"), "directory"),
        (("ARCHIVE", "--output", "OUT", "--weights", "WEIGHTS", "--cpus-per-actor", "-1"), "more than 0, got -1"),
        (("ARCHIVE", "--output", "OUT", "--weights", "WEIGHTS", "--actors", "0"), "got 0:0"),
        (
            ("ARCHIVE", "--output", "OUT", "--weights", "WEIGHTS", "--score-threshold", "2"),
            "score_threshold must lie in",
        ),
        (("ARCHIVE", "--output", "OUT", "--weights", "WEIGHTS", "--actors", "4:2"), "got 4:2"),
        (("ARCHIVE", "--output", "OUT", "--weights", "WEIGHTS", "--actors", "many"), "got 'many'"),
        (("ARCHIVE", "--output", "OUT", "--weights", "WEIGHTS", "--images-per-shard", "0"), "at least 1, got 0"),
    ],
)
def test_a_wrong_request_exits_2_and_starts_nothing(
    arguments: tuple[str, ...],
    message: str,
    archive: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "README.txt").write_text("not weights")
    places = {
        "ARCHIVE/README.txt": tmp_path / "README.txt",
        "ARCHIVE": archive,
        "WEIGHTS": weights,
        "OUT": tmp_path / "out",
    }
    with pytest.raises(SystemExit) as ended:
        command.run("segment", SegmentConfig, main, [str(places.get(argument, argument)) for argument in arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not ray.is_initialized()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reason", ["it was not compiled", None])
def test_a_missing_kernel_is_said_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str | None
) -> None:
    monkeypatch.setattr("model.compiled_winograd.why_missing", lambda: reason)
    _warn_of_missing_kernel()
    said = [record.getMessage() for record in caplog.records]
    assert said == (
        [f"the model is slower than it could be, without its kernel in C: {reason}; with GCC, install again"]
        if reason
        else []
    )


def test_a_wrong_request_is_one_line_in_a_terminal(weights: Path, tmp_path: Path) -> None:
    run = maskline("segment", tmp_path / "nowhere", "--output", tmp_path / "out", "--weights", weights)
    assert run.returncode == 2
    assert "nowhere" in run.stderr
    assert run.stderr.count("\n") == 1, run.stderr


def test_a_keypoint_network_leaves_keypoints_and_no_masks(archive: Path, tmp_path: Path) -> None:
    config = replace(
        model.R18_FPN(num_classes=2, min_size=96, max_size=160),
        mask_head="none",
        num_keypoints=4,
        keypoint_convs=1,
        keypoint_channels=16,
    )
    weights, output = tmp_path / "keypoints.safetensors", tmp_path / "out"
    model.save(model.random_network(config, seed=0, recipe=FEW_PROPOSALS), weights)
    summary = last_json(maskline("segment", archive / "loose", "--output", output, "--weights", weights, "--json"))
    rows = open_results(str(output)).instances().to_table().to_pylist()
    assert len(rows) == summary["instances"] > 0
    for row in rows:
        assert row["mask_rle"] is None
        points = np.array(row["keypoints"]).reshape(4, 3)
        assert (points[:, 0] >= row["x1"] - 1).all()
        assert (points[:, 0] <= row["x2"] + 1).all()


def test_a_network_that_needs_proposals_is_refused_with_the_way_out(archive: Path, tmp_path: Path) -> None:
    config = replace(model.R18_FPN(num_classes=3, min_size=96, max_size=160), proposals="given", mask_head="none")
    weights = tmp_path / "fast.safetensors"
    model.save(model.random_network(config, seed=0), weights)
    run = maskline("segment", archive, "--output", tmp_path / "out", "--weights", weights)
    assert run.returncode == 2
    assert "fast.safetensors are a Fast R-CNN" in run.stderr
    assert "predict(images, proposals=...)" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_weights_find_the_same_in_any_batch(precision: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "archive", num_images=48, num_in_tar=0, seed=5)
    found = []
    for batch_size in (1, 4, 16):
        output = tmp_path / f"out{batch_size}"
        options = ("--precision", precision, "--batch-size", batch_size, "--score-threshold", 0.25, "--json")
        summary = last_json(
            maskline("segment", tmp_path / "archive", "--output", output, "--weights", "demo", *options)
        )
        assert (summary["images_ok"], summary["batch_size"]) == (48, batch_size)
        found.append(open_results(str(output)).instances().to_table().to_pylist())
    alone, *others = found
    assert len(alone) > 100
    for together in others:
        _all_found(alone, together)
        _all_found(together, alone)


def _all_found(rows: list[dict[str, Any]], among: list[dict[str, Any]]) -> None:
    """Each sure instance has one of its own class in its place, with the same mask."""
    for row in rows:
        if row["score"] < 0.3:
            continue
        same = [
            one for one in among if (one["image_key"], one["category_id"]) == (row["image_key"], row["category_id"])
        ]
        overlaps = coco_mask.iou([_rle(row)], [_rle(one) for one in same], [0] * len(same))
        assert overlaps.max() >= 0.99


def _rle(row: dict[str, Any]) -> dict[str, Any]:
    return {"size": [row["mask_height"], row["mask_width"]], "counts": row["mask_rle"].encode()}


def test_pinned_weights_are_taken_and_others_refused(archive: Path, weights: Path, tmp_path: Path) -> None:
    pin = hashlib.sha256(weights.read_bytes()).hexdigest()
    command = ("segment", archive, "--output", tmp_path / "out", "--weights", weights, "--dry-run", "--weights-sha256")
    taken = maskline(*command, pin.upper())
    assert taken.returncode == 0, taken.stderr
    refused = maskline(*command, "0" * 64)
    assert refused.returncode == 2
    assert pin in refused.stderr.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_storage_calls_that_are_tried_again_are_told(
    archive: Path, weights: Path, s3_endpoint: str, s3_environment: Callable[[str], None]
) -> None:
    with FaultyProxy(s3_endpoint) as proxy:
        s3_environment(proxy.endpoint)
        output = new_root("s3")
        proxy.faults = ["", "", "503", ""] * 20
        # without a report, which is made after the count
        options = ("--output", output, "--weights", weights, "--no-report", "--json")
        found = last_json(maskline("segment", archive, *options))
        spent = 20 - proxy.faults.count("503")
    assert found["images_ok"] == 18
    assert spent > 3
    assert spent // 2 <= found["storage_retries"] <= spent  # calls that create are tried by their own rule, not counted

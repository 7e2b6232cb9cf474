"""maskline describe as a user runs it, on a small network."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

import model
from jobs.describe import DescribeConfig, describe, main
from model import gmacs
from model.structures import ImageSize
from pipeline.errors import ConfigError
from tests.jobs.test_segment import last_json, maskline

CATEGORIES = {1: "cat", 2: "[red]dog", 3: "bird"}


@pytest.fixture(scope="module")
def net() -> model.MaskRCNN:
    config = model.R18_FPN(num_classes=4, min_size=90, max_size=150)
    return model.random_network(config, seed=3, categories=CATEGORIES)


@pytest.fixture(scope="module")
def weights(net: model.MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model.save(net, path)
    return path


def test_json_holds_what_the_file_does(weights: Path, net: model.MaskRCNN) -> None:
    found = last_json(maskline("describe", weights, "--json"))
    assert found["name"] == "small.safetensors"
    assert found["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest() == net.sha256
    assert found["classes"] == {str(index): name for index, name in CATEGORIES.items()}
    assert found["recipe"] == json.loads(json.dumps(asdict(net.recipe)))
    assert found["config"] == json.loads(json.dumps(asdict(net.config)))
    parameters = sum(parameter.numel() for parameter in net.network.parameters())
    assert sum(part["parameters"] for part in found["parts"].values()) == parameters
    assert found["input"] == {"height": 96, "width": 160}  # 90 × 150 to multiples of 32
    expected = gmacs.count(net.config, net.recipe, ImageSize(96, 160), num_proposals=1000, num_detections=100)
    assert {name: part["macs"] for name, part in found["parts"].items()} == expected


def test_tables_hold_every_row(weights: Path, net: model.MaskRCNN, capsys: pytest.CaptureFixture[str]) -> None:
    main(DescribeConfig(weights=str(weights), height=64, width=96))
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == f"small.safetensors, sha256 {net.sha256}"
    rows = {tuple(cell.strip() for cell in line.split("│")[1:-1]) for line in shown.splitlines() if "│" in line}
    assert {(str(index), name) for index, name in CATEGORIES.items()} <= rows
    assert ("body", "resnet18") in rows
    assert ("pixel_mean", "0.485, 0.456, 0.406") in rows
    stem = 3 * 64 * 7 * 7
    assert ("stem", f"{stem + 2 * 64:,}", f"{stem * 32 * 48 / 1e9:.3f}") in rows  # a norm has two for each channel
    assert any(row[0] == "all" for row in rows)
    assert "64 × 96" in shown


def test_a_size_may_be_asked_for(weights: Path) -> None:
    small, large = (
        describe(DescribeConfig(weights=str(weights), height=height, width=96))["parts"] for height in (64, 128)
    )
    for name in ("stem", "res2", "FPN output"):
        assert large[name]["macs"] == 2 * small[name]["macs"]
    assert large["box head"] == small["box head"]


def test_a_wrong_request_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("these are no weights")
    with pytest.raises(ConfigError, match=r"text\.pth"):
        describe(DescribeConfig(weights=str(tmp_path / "text.pth")))
    with pytest.raises(ConfigError, match="no weights at"):
        describe(DescribeConfig(weights=str(tmp_path / "none.pth")))
    with pytest.raises(ConfigError, match="height"):
        DescribeConfig(weights="coco", height=0)

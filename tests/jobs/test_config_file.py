from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from jobs import command
from jobs.config_file import as_toml, positional_names, preset_names, with_file
from jobs.evaluate import EvaluateConfig
from jobs.segment_config import SegmentConfig
from jobs.train_config import TrainConfig
from pipeline.errors import ConfigError

FILE = """
inputs = ["photos/", "more.tar"]
output = "out"
weights = "demo"
score-threshold = 0.25
images_per_shard = 100
report = false
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "run.toml").write_text(FILE)
    return str(tmp_path / "run.toml")


def parsed(*arguments: str) -> SegmentConfig:
    found: list[SegmentConfig] = []
    command.run("segment", SegmentConfig, found.append, arguments)
    return found[0]


def test_a_file_gives_options_and_the_command_line_overrides_them(file: str) -> None:
    config = parsed("--config", file)
    assert config == SegmentConfig(
        inputs=("photos/", "more.tar"), output="out", weights="demo", score_threshold=0.25, images_per_shard=100,
        report=False,
    )  # fmt: skip
    config = parsed("other/", f"--config={file}", "--score-threshold", "0.5", "--report", "--json")
    assert config.inputs == ("other/",)
    assert (config.score_threshold, config.report, config.json, config.images_per_shard) == (0.5, True, True, 100)


def test_of_two_files_the_later_counts(file: str, tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text('output = "b"\ninputs = "x"\n')
    config = parsed("--config", file, "--config", str(tmp_path / "b.toml"))
    assert (config.output, config.inputs, config.score_threshold) == ("b", ("x",), 0.25)


def test_what_is_printed_gives_the_same_again(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed("--config", file, "--actors", "2:4", "--precision", "bf16")
    ran: list[SegmentConfig] = []
    command.run("segment", SegmentConfig, ran.append, ["--config", file, "--actors", "2:4", "--print-config"])
    assert not ran
    assert tomllib.loads(capsys.readouterr().out)["actors"] == "2:4"
    (tmp_path / "again.toml").write_text(as_toml(config))
    assert parsed("--config", str(tmp_path / "again.toml")) == config


def test_nested_options_are_tables(tmp_path: Path) -> None:
    config = TrainConfig(train_annotations="a.json", train_images='é "i" 😀', output="o")
    (tmp_path / "train.toml").write_text(as_toml(config))
    found: list[TrainConfig] = []
    arguments = ["--config", str(tmp_path / "train.toml"), "--optimiser.learning-rate", "0.5"]
    command.run("train", TrainConfig, found.append, arguments)
    assert found[0].optimiser.learning_rate == 0.5
    assert found[0].optimiser.weight_decay == config.optimiser.weight_decay
    assert found[0].train_images == config.train_images


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "score-treshold = 0.5",
            r"score-treshold, which is no option of maskline segment; did you mean score-threshold\?",
        ),
        ("colour = 3", "colour, which is no option of maskline segment$"),
        ("[output]\nx = 1", "has a table output, but that is one option"),
        ("output = ", "is not TOML"),
    ],
)
def test_a_wrong_file_is_told_in_words(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        with_file("segment", SegmentConfig, ["--config", str(tmp_path / "run.toml")])


def test_a_missing_file_and_a_missing_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="no configuration at nowhere"):
        with_file("segment", SegmentConfig, ["--config", "nowhere.toml"])
    with pytest.raises(ConfigError, match="--config needs a file"):
        with_file("segment", SegmentConfig, ["photos/", "--config"])
    assert with_file("segment", SegmentConfig, ["photos/", "--json"]) == ["photos/", "--json"]
    assert positional_names(SegmentConfig) == {"inputs"}


def test_a_value_of_the_wrong_kind_exits_2(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text(f"score-threshold = {json.dumps('high')}")
    with pytest.raises(SystemExit) as ended:
        parsed("--config", file, "--config", str(tmp_path / "bad.toml"))
    assert ended.value.code == 2
    assert "high" in capsys.readouterr().err


def test_a_preset_stands_before_files_and_options(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('output = "out"\nweights = "demo"\nbatch-size = 4\n')
    given = ["photos/", "--config", str(tmp_path / "run.toml"), "--preset", "low-memory", "--images-per-shard", "7"]
    config = parsed(*given)
    assert (config.batch_size, config.shrink_jpegs, config.images_per_shard) == (4, True, 7)


@pytest.mark.parametrize("preset", preset_names("segment"))
def test_presets_are_known_and_hold_only_options(preset: str) -> None:
    assert parsed("photos/", "--output", "o", "--weights", "w", "--preset", preset) != parsed(
        "photos/", "--output", "o", "--weights", "w"
    )


def test_a_preset_of_training() -> None:
    found: list[TrainConfig] = []
    needed = ["--train-annotations", "a.json", "--train-images", "photos/", "--output", "o"]
    command.run("train", TrainConfig, found.append, [*needed, "--preset", "cpu"])
    assert (found[0].device, found[0].precision) == ("cpu", "bf16")
    assert preset_names("train") == ["cpu"]


def test_a_preset_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="no preset 'fast'; it has cpu, low-memory, throughput"):
        with_file("segment", SegmentConfig, ["--preset", "fast"])
    with pytest.raises(ConfigError, match="maskline evaluate has no preset 'cpu'; it has none"):
        with_file("evaluate", EvaluateConfig, ["--preset=cpu"])

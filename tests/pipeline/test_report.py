"""The page of a run over made-up tables: its numbers are the table's, its words are true, and it is escaped."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest

from jobs.sql import SqlConfig, query
from pipeline.errors import ConfigError, DecodeError
from pipeline.report import bound_by, find_drift, link_of, read_summary, runs_table, write_report
from pipeline.results import open_results
from pipeline.run_statistics import number_bin, read_statistics
from tests.pipeline.made_up_tables import add_run, write_images

NASTY = "<script>alert(1)</script>&.png"


def page_of(output: Path, run_id: str, **options: float) -> str:
    uri = write_report(open_results(str(output)), run_id, **options)
    assert uri == f"{output}/_runs/{run_id}.html"
    return Path(uri).read_text()


def test_a_page_says_what_the_table_holds(tmp_path: Path) -> None:
    archive, output = tmp_path / "archive", tmp_path / "out"
    nasty = NASTY.replace("/", "∕")
    write_images(archive, ["a.png", "b.png", "c.png", nasty])
    add_run(str(output), "r1", str(archive), {
        "a.png": [0.9, 0.8], "b.png": [], "c.png": [0.55] * 5, nasty: DecodeError("truncated", "<b>cut</b>"),
    })  # fmt: skip
    page = page_of(output, "r1", price_per_hour=2.5)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for words in ("3 images ok", "1 failed", "7 instances", "This is the first run", "truncated : 1", "2.5 an hour"):
        assert words in re.sub(r"\s+", " ", text), words
    assert "<script" not in page
    assert "<b>cut" not in page
    assert html.escape(nasty) in page
    assert page.count("<img") == 3  # best, crowded or middling, and the empty one; no image twice
    assert not re.search(r"(src|href)=\"(?!data:image/jpeg;base64,|file://)", page)
    statistics = read_statistics(open_results(str(output)), "r1")
    assert {sample.kind for sample in statistics.samples} >= {"best", "empty", "failed"}
    assert statistics.scores.keys() <= {"disc", "ring"}
    assert sum(map(sum, statistics.scores.values())) == statistics.instances == 7


def test_drift_is_seen_where_it_was_planted_and_nowhere_else(tmp_path: Path) -> None:
    output, chance = tmp_path / "out", np.random.default_rng(0)
    for run, mean in (("r1", 4.0), ("r2", 4.0), ("r3", 1.0)):
        names = [f"{run}-{index:03d}.png" for index in range(120)]
        write_images(tmp_path / run, names)
        scores = {name: chance.uniform(0.5, 1, chance.poisson(mean)).tolist() for name in names}
        add_run(str(output), run, str(tmp_path / run), scores, seed=int(mean))
    results = open_results(str(output))
    like, unlike = (find_drift(results, read_statistics(results, run)) for run in ("r2", "r3"))
    assert like is not None
    assert unlike is not None
    assert like.previous_run == "r1"
    assert like.verdict == "No drift: this run is like the one before."
    assert unlike.is_drift
    assert [change.name for change in unlike.changes if change.size != "none"] == ["instances per image"]
    assert "instances per image changed much" in page_of(output, "r3")


def test_a_run_that_committed_nothing_has_its_page(tmp_path: Path) -> None:
    write_images(tmp_path / "archive", ["a.png"])
    add_run(str(tmp_path / "out"), "r1", str(tmp_path / "archive"), {"a.png": [0.9]})
    runs = tmp_path / "out" / "_runs"
    (runs / "r2.json").write_text('{"run_id": "r2", "output": "o"}')  # as an older version may have left it
    page = page_of(tmp_path / "out", "r2")
    assert "Too few images to tell" in page
    assert "Nothing was computed" in page


def test_runs_are_rows(tmp_path: Path) -> None:
    write_images(tmp_path / "archive", ["a.png"])
    assert runs_table(str(tmp_path / "out")).num_rows == 0
    for run in ("r1", "r2"):
        add_run(str(tmp_path / "out"), run, str(tmp_path / "archive"), {"a.png": [0.9, 0.8]})
    columns, rows = query(
        SqlConfig(output=str(tmp_path / "out"), query="SELECT run_id, instances, stage_seconds ->> 'decode' FROM runs")
    )
    assert columns[:2] == ["run_id", "instances"]
    assert rows == [("r1", 2, "1.5"), ("r2", 2, "1.5")]


def test_runs_without_a_record_are_refused_in_words(tmp_path: Path) -> None:
    write_images(tmp_path / "archive", ["a.png"])
    add_run(str(tmp_path / "out"), "r1", str(tmp_path / "archive"), {"a.png": [0.9]})
    with pytest.raises(ConfigError, match="no record of a run r9; its runs are r1"):
        read_summary(str(tmp_path / "out"), "r9")
    (tmp_path / "out" / "_runs" / "r1.json").write_text("{")
    with pytest.raises(ConfigError, match=r"r1\.json is damaged"):
        read_summary(str(tmp_path / "out"), "r1")


@pytest.mark.parametrize(
    ("busy", "stages", "words"),
    [
        (0.93, {"fetch": 1, "decode": 9, "model": 20, "commit": 1}, "The model: it computed 93%"),
        (0.30, {"fetch": 1, "decode": 9, "model": 20, "commit": 2}, "Decoding: more CPUs"),
        (0.30, {"fetch": 7, "decode": 3, "model": 20, "commit": 2}, "Reading the archive"),
        (0.30, {"fetch": 1, "decode": 1, "model": 20, "commit": 8}, "Writing the results"),
        (0.0, {}, "Nothing was computed"),
    ],
)
def test_what_bounds_a_run_is_told(busy: float, stages: dict[str, float], words: str) -> None:
    assert words in bound_by({"model_busy": busy, "stage_seconds": stages})


def test_numbers_of_instances_fall_into_doubling_bins() -> None:
    assert [number_bin(number) for number in (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 100)] == [
        "0", "1", "2", "3–4", "3–4", "5–8", "5–8", "9–16", "9–16", "17–32", "65–128",
    ]  # fmt: skip


def test_links_lead_nowhere_but_to_the_image() -> None:
    assert link_of('/a b/"x"#.png') == "file:///a%20b/%22x%22%23.png"
    assert link_of("s3://b/x.tar#m é.jpg") == "s3://b/x.tar#m%20%C3%A9.jpg"

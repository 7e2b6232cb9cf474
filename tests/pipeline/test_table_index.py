"""Filters against a slow loop over the rows, and over a million rows by the clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DecodeError
from pipeline.results import open_results
from pipeline.table_index import ORDERS, Filter, TableIndex, opened_index
from tests.pipeline.made_up_tables import add_run, write_images


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, chance = tmp_path_factory.mktemp("index"), np.random.default_rng(0)
    for run in ("r1", "r2"):
        names = [f"{run}-{index:02d}.png" for index in range(30)]
        write_images(root / run, names)
        scores: dict[str, Any] = {name: chance.random(chance.integers(0, 5)).round(2).tolist() for name in names}
        bad = {names[3]: DecodeError("truncated", "cut"), names[7]: DecodeError("empty", "0 bytes")}
        add_run(str(root / "out"), run, str(root / run), scores | bad, seed=len(run))
    return root / "out"


@pytest.fixture(scope="module")
def index(table: Path) -> Iterator[TableIndex]:
    with opened_index(open_results(str(table))) as opened:
        yield opened


def slow(table: Path, wanted: Filter) -> list[str]:
    """Keys in order, by a loop over all rows."""
    results = open_results(str(table))
    images, instances = results.images().to_table().to_pylist(), results.instances().to_table().to_pylist()
    own = {image["image_key"]: [row for row in instances if row["image_key"] == image["image_key"]] for image in images}

    def meets(row: dict[str, Any]) -> bool:
        return (
            (wanted.category is None or row["category"] == wanted.category)
            and (wanted.min_score is None or row["score"] >= np.float32(wanted.min_score))
            and (wanted.max_score is None or row["score"] <= np.float32(wanted.max_score))
            and (wanted.min_area is None or row["area"] >= wanted.min_area)
            and (wanted.max_area is None or row["area"] <= wanted.max_area)
        )

    bounds = (wanted.category, wanted.min_score, wanted.max_score, wanted.min_area, wanted.max_area)
    kept = [
        image
        for image in images
        if (wanted.status is None or wanted.status in (image["status"], image["reason"]))
        and (wanted.run is None or image["run_id"] == wanted.run)
        and (wanted.text is None or wanted.text.lower() in image["image_key"].lower())
        and (all(bound is None for bound in bounds) or any(map(meets, own[image["image_key"]])))
    ]

    def place(image: dict[str, Any]) -> tuple[float, str]:
        scores = [row["score"] for row in own[image["image_key"]]]
        rank = {
            "key": 0.0,
            "best": -max(scores, default=-2),
            "worst": max(scores, default=2),
            "most": -image["num_instances"],
            "fewest": image["num_instances"],
        }
        return rank[wanted.order], image["image_key"]

    return [image["image_key"] for image in sorted(kept, key=place)]


FILTERS = st.builds(
    Filter,
    category=st.sampled_from([None, None, "disc", "ring", "none such"]),
    min_score=st.none() | st.floats(0, 1, width=32),
    max_score=st.none() | st.floats(0, 1, width=32),
    min_area=st.none() | st.integers(0, 2_000),
    max_area=st.none() | st.integers(0, 3_000),
    status=st.sampled_from([None, None, "ok", "failed", "truncated"]),
    run=st.sampled_from([None, None, "r1", "r9"]),
    text=st.sampled_from([None, None, "R1-0", "%", "'"]),
    order=st.sampled_from(sorted(ORDERS)),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=FILTERS)
def test_filters_agree_with_a_loop_over_the_rows(table: Path, index: TableIndex, wanted: Filter) -> None:
    keys = slow(table, wanted)
    found = index.page(wanted, count=500)
    assert found["total"] == len(keys)
    assert [image["image_key"] for image in found["images"]] == keys
    part = index.page(wanted, start=7, count=5)
    assert (part["total"], [image["image_key"] for image in part["images"]]) == (len(keys), keys[7:12])


def test_choices_count_what_there_is(table: Path, index: TableIndex) -> None:
    choices = index.choices()
    assert dict(choices["statuses"]) == {"ok": 56, "truncated": 2, "empty": 2}
    assert choices["runs"] == [("r2", 30), ("r1", 30)]
    assert sum(count for _, count in choices["categories"]) == open_results(str(table)).instances().count_rows()


def test_instances_of_an_image_come_whole_and_best_first(table: Path, index: TableIndex) -> None:
    rows = open_results(str(table)).instances().to_table().to_pylist()
    for image in index.page(Filter(order="most"), count=3)["images"]:
        own = [row for row in rows if row["image_key"] == image["image_key"]]
        assert index.instances(image["image_key"]) == sorted(own, key=lambda row: row["instance_index"])
        assert index.has(image["image_key"])
    assert not index.has("/etc/passwd")
    assert index.instances("/etc/passwd") == []


def test_what_is_no_page_is_refused(index: TableIndex) -> None:
    with pytest.raises(ConfigError, match="holds 1 to 500, got 0 and 501"):
        index.page(Filter(), count=501)
    with pytest.raises(ConfigError, match="order must be one of key, best, worst, most, fewest, got 'size'"):
        Filter(order="size")  # type: ignore[arg-type]

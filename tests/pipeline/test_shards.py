from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import commits
from pipeline.archive import ITEM_SCHEMA
from pipeline.errors import ConfigError
from pipeline.results import Results
from pipeline.shards import Plan, Shard, ShardConfig
from tests.pipeline.test_results import commit_rows


def listing(items: list[tuple[str, str]]) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(items), 3):  # several batches
        rows = [
            {
                "image_key": key,
                "source_version": version,
                "kind": "file",
                "container": key,
                "member": "",
                "offset": 0,
                "bytes": 10,
                "error": None,
            }
            for key, version in items[start : start + 3]
        ]
        yield from pa.Table.from_pylist(rows, schema=ITEM_SCHEMA).to_batches()


OPEN_PLANS: list[Plan] = []


@pytest.fixture(autouse=True)
def close_plans() -> Iterator[None]:
    yield
    while OPEN_PLANS:
        OPEN_PLANS.pop().__exit__(None, None, None)


def make_plan(
    items: list[tuple[str, str]],
    output: Path | None = None,
    *,
    weights: str = "1",
    settings: str = "2",
    **config: object,
) -> Plan:
    committed = Results(str(output), commits.read_table(str(output)) if output else [])
    plan = Plan(
        listing(items),
        committed,
        weights_sha256=weights,
        settings_hash=settings,
        config=ShardConfig(**config),  # type: ignore[arg-type]
    )
    OPEN_PLANS.append(plan)
    return plan


def keys(shards: list[Shard]) -> list[list[str]]:
    return [shard.items["image_key"].to_pylist() for shard in shards]


ITEMS = [(f"k{index}", "v") for index in range(7)]


def test_shards_cut_the_listing_in_order() -> None:
    plan = make_plan(ITEMS, images_per_shard=3)
    assert keys(list(plan.shards())) == [["k0", "k1", "k2"], ["k3", "k4", "k5"], ["k6"]]
    assert (plan.images_listed, plan.num_images, plan.num_shards, plan.num_bytes) == (7, 7, 3, 70)


def test_the_same_work_has_the_same_name_and_other_work_another() -> None:
    def ids(**change: object) -> list[str]:
        return [shard.shard_id for shard in make_plan(ITEMS, images_per_shard=3, **change).shards()]  # type: ignore[arg-type]

    first = ids()
    assert ids() == first
    assert len(set(first)) == 3
    assert not set(ids(weights="other")) & set(first)
    assert not set(ids(settings="other")) & set(first)
    changed = [shard.shard_id for shard in make_plan([("k0", "v2"), *ITEMS[1:]], images_per_shard=3).shards()]
    assert changed[0] != first[0]
    assert changed[1:] == first[1:]


def test_committed_images_are_not_planned_again(tmp_path: Path) -> None:
    commit_rows(tmp_path, ["k0", "k3"], run_id="r1", shard_id="s1", instances=1)
    plan = make_plan(ITEMS, tmp_path, images_per_shard=10)
    assert keys(list(plan.shards())) == [["k1", "k2", "k4", "k5", "k6"]]
    assert (plan.images_done, plan.shards_skipped) == (2, 1)


@pytest.mark.parametrize("change", [{"weights": "other"}, {"settings": "other"}])
def test_rows_of_other_weights_or_settings_do_not_count(tmp_path: Path, change: dict[str, str]) -> None:
    commit_rows(tmp_path, ["k0"], run_id="r1", shard_id="s1", instances=1)
    assert (
        make_plan(ITEMS, tmp_path, weights=change.get("weights", "1"), settings=change.get("settings", "2")).num_images
        == 7
    )


def test_a_changed_object_is_planned_and_named_anew_even_when_it_changes_back(tmp_path: Path) -> None:
    first = next(make_plan([("k0", "v")]).shards()).shard_id
    commit_rows(tmp_path, ["k0"], run_id="r1", shard_id=first, instances=1)  # its rows say version "v"
    assert make_plan([("k0", "v")], tmp_path).num_images == 0
    second = next(make_plan([("k0", "v2")], tmp_path).shards()).shard_id
    assert second != first


def test_going_back_to_earlier_weights_does_not_meet_the_old_commit(tmp_path: Path) -> None:
    first = next(make_plan([("k0", "v")]).shards()).shard_id
    commit_rows(tmp_path, ["k0"], run_id="r1", shard_id=first, instances=1)
    other = next(make_plan([("k0", "v")], tmp_path, weights="other").shards()).shard_id
    commit_rows(tmp_path, ["k0"], run_id="r2", shard_id=other, instances=1)
    (tmp_path / "_commits" / f"{other}.json").write_bytes(
        (tmp_path / "_commits" / f"{other}.json")
        .read_bytes()
        .replace(b'"weights_sha256": "1"', b'"weights_sha256": "other"')
    )
    back = list(make_plan([("k0", "v")], tmp_path).shards())
    assert len(back) == 1
    assert back[0].shard_id not in (first, other)


def test_the_last_of_equal_keys_counts() -> None:
    plan = make_plan([("a", "v1"), ("b", "v"), ("a", "v2")])
    (shard,) = plan.shards()
    assert shard.items["image_key"].to_pylist() == ["b", "a"]
    assert shard.items["source_version"].to_pylist() == ["v", "v2"]


def test_failed_rows_are_planned_again_only_when_asked(tmp_path: Path) -> None:
    from pipeline import results
    from pipeline.errors import DecodeError
    from pipeline.results import ShardRows
    from tests.pipeline.test_results import METADATA, make_items  # one failed row, committed

    rows = ShardRows(make_items(["k0"]), "s", "r")
    rows.add_failed(0, DecodeError("missing", ""), None)
    tables = rows.tables()
    files = tuple(
        results.write_table(str(tmp_path), name, tables[name], "x", METADATA, "r") for name in ("images", "instances")
    )
    commits.create_table(str(tmp_path))
    commits.publish(
        str(tmp_path),
        commits.Commit(
            shard_id="s", attempt_id="a", run_id="r", weights_sha256="1", settings_hash="2", inputs_hash="3",
            images=1, failed_by_reason={"missing": 1}, instances=0, files=files,
        ),
        exclusive=True,
    )  # fmt: skip
    assert make_plan([("k0", "v")], tmp_path).num_images == 0
    assert make_plan([("k0", "v")], tmp_path, retry_failed=True).num_images == 1


def test_max_images_bounds_the_plan() -> None:
    plan = make_plan(ITEMS, images_per_shard=2, max_images=3)
    assert keys(list(plan.shards())) == [["k0", "k1"], ["k2"]]


def test_an_empty_listing_is_an_empty_plan() -> None:
    plan = make_plan([])
    assert (plan.num_images, plan.num_shards, list(plan.shards())) == (0, 0, [])


@pytest.mark.parametrize("bad", [{"images_per_shard": 0}, {"max_images": 0}])
def test_bounds_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        ShardConfig(**bad)  # type: ignore[arg-type]

from __future__ import annotations

import pytest

from pipeline.errors import ShardError
from pipeline.summary import Summary, new_run_id


def make_summary(**fields: object) -> Summary:
    return Summary(run_id="r", output="o", images_listed=4, images_already_done=0, images_planned=4, **fields)  # type: ignore[arg-type]


def test_run_ids_sort_by_time_also_after_one_from_a_clock_ahead() -> None:
    first = new_run_id()
    assert first < new_run_id(first)
    ahead = "29991231T235959999000-abcdef"
    assert ahead < new_run_id(ahead) < new_run_id(new_run_id(ahead))


def test_a_whole_run_raises_nothing() -> None:
    make_summary(shards_planned=2, shards_committed=2).raise_if_incomplete()


def test_what_is_missing_is_named_with_how_to_go_on() -> None:
    with pytest.raises(ShardError, match=r"1 of 3 shards .* first is abc, .*: no disk\. .*same command"):
        make_summary(shards_planned=3, shards_committed=2, shards_failed={"abc": "no disk"}).raise_if_incomplete()
    with pytest.raises(ShardError, match="stopped with 2 of 3 shards to do"):
        make_summary(shards_planned=3, shards_committed=1, stopped=True).raise_if_incomplete()

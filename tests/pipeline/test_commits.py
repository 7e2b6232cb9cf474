from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import commits, storage
from pipeline.commits import Commit, CommittedFile
from pipeline.errors import CommitError, ConfigError


def make_commit(attempt_id: str, shard_id: str = "s1", run_id: str = "r1") -> Commit:
    file = CommittedFile(
        table="images", path=f"images/run={run_id}/{shard_id}-{attempt_id}.parquet", bytes=1, rows=2, sha256="0"
    )
    return Commit(
        shard_id=shard_id,
        attempt_id=attempt_id,
        run_id=run_id,
        weights_sha256="w",
        settings_hash="s",
        inputs_hash="i",
        images=2,
        failed_by_reason={"missing": 1},
        instances=3,
        files=(file,),
    )


def test_a_commit_reads_back_equal(tmp_path: Path) -> None:
    commits.publish(str(tmp_path), make_commit("a"), exclusive=True)
    assert commits.read_commits(str(tmp_path)) == [make_commit("a")]
    assert commits.read_commit(str(tmp_path), "s1") == make_commit("a")
    assert commits.read_commit(str(tmp_path), "s2") is None


def test_the_second_attempt_loses_and_the_first_stays(tmp_path: Path) -> None:
    assert commits.publish(str(tmp_path), make_commit("a"), exclusive=True) == "won"
    assert commits.publish(str(tmp_path), make_commit("b"), exclusive=True) == "lost"
    assert commits.read_commits(str(tmp_path)) == [make_commit("a")]


def test_of_eight_racing_attempts_one_wins(tmp_path: Path) -> None:
    for race in range(50):
        outcomes: list[tuple[str, str]] = []
        barrier = threading.Barrier(8)

        def attempt(
            name: str,
            race: int = race,
            outcomes: list[tuple[str, str]] = outcomes,
            barrier: threading.Barrier = barrier,
        ) -> None:
            barrier.wait()
            outcomes.append((commits.publish(str(tmp_path), make_commit(name, f"s{race}"), exclusive=True), name))

        threads = [threading.Thread(target=attempt, args=(f"a{index}",)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [name for outcome, name in outcomes if outcome == "won"]
        found = commits.read_commit(str(tmp_path), f"s{race}")
        assert found is not None
        assert winners == [found.attempt_id]


Create = Callable[[str, bytes], bool]


def lose_answers(create: Create, *, applied: bool, times: int, error: type[OSError] = TimeoutError) -> Create:
    """A store whose first answers are lost, the write done or not."""
    calls = 0

    def wrapped(uri: str, data: bytes) -> bool:
        nonlocal calls
        calls += 1
        if calls <= times:
            if applied:
                create(uri, data)
            raise error("no answer")
        return create(uri, data)

    return wrapped


@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError, storage.StoreConflict])
@pytest.mark.parametrize("applied", [True, False])
def test_a_lost_answer_is_settled_by_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, applied: bool, error: type[OSError]
) -> None:
    lossy = lose_answers(storage.create_exclusive, applied=applied, times=2, error=error)
    monkeypatch.setattr(storage, "create_exclusive", lossy)
    assert commits.publish(str(tmp_path), make_commit("a"), exclusive=True) == "won"
    assert commits.publish(str(tmp_path), make_commit("b"), exclusive=True) == "lost"


def test_the_answer_exists_to_our_own_lost_write_is_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client below retried by itself: its first PUT was applied, its second is answered 412."""
    create = storage.create_exclusive
    monkeypatch.setattr(storage, "create_exclusive", lambda uri, data: create(uri, data) and create(uri, data))
    assert commits.publish(str(tmp_path), make_commit("a"), exclusive=True) == "won"


def test_a_store_that_never_answers_is_an_error_and_leaves_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "COMMIT_BUDGET_SECONDS", 0.3)
    monkeypatch.setattr(storage, "create_exclusive", lose_answers(storage.create_exclusive, applied=False, times=10**6))
    with pytest.raises(CommitError, match="cannot commit shard s1"):
        commits.publish(str(tmp_path), make_commit("a"), exclusive=True)
    assert commits.read_commit(str(tmp_path), "s1") is None


def test_without_create_only_the_last_writer_wins(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert commits.publish(str(tmp_path), make_commit(name), exclusive=False) == "won"
    assert commits.read_commits(str(tmp_path)) == [make_commit("b")]


def test_commits_come_in_the_order_of_runs(tmp_path: Path) -> None:
    for run_id, shard_id in (("r2", "a"), ("r1", "z"), ("r1", "b")):
        commits.publish(str(tmp_path), make_commit("x", shard_id, run_id), exclusive=True)
    assert [(c.run_id, c.shard_id) for c in commits.read_commits(str(tmp_path))] == [
        ("r1", "b"),
        ("r1", "z"),
        ("r2", "a"),
    ]


def test_attempts_are_counted(tmp_path: Path) -> None:
    assert commits.count_attempts(str(tmp_path))["s1"] == 0
    for name in ("a", "b"):
        commits.begin_attempt(str(tmp_path), "s1", name, run_id="r", host="h", suspect=False)
    commits.begin_attempt(str(tmp_path), "s2", "a", run_id="r", host="h", suspect=True)
    assert commits.count_attempts(str(tmp_path)) == {"s1": 2, "s2": 1}


def test_a_table_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a results table"):
        commits.check_table(str(tmp_path))
    commits.create_table(str(tmp_path))
    commits.create_table(str(tmp_path))
    (tmp_path / "_maskline.json").write_text('{"format_version": 99}')
    with pytest.raises(ConfigError, match="format version 99"):
        commits.read_table(str(tmp_path))


def test_a_damaged_commit_is_named_not_guessed(tmp_path: Path) -> None:
    commits.publish(str(tmp_path), make_commit("a"), exclusive=True)
    (tmp_path / "_commits" / "bad.json").write_text("{")
    with pytest.raises(CommitError, match=r"bad\.json"):
        commits.read_commits(str(tmp_path))


def test_on_every_store_the_first_commit_stays(store: str) -> None:
    assert [commits.publish(store, make_commit(name), exclusive=True) for name in ("a", "b", "a")] == [
        "won",
        "lost",
        "won",
    ]
    assert commits.read_commits(store) == [make_commit("a")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "two"}, "images must be a whole number of at least 0, got 'two'"),
        ({"instances": -1}, "instances must be a whole number of at least 0, got -1"),
        ({"run_id": None}, "run_id must be text, got None"),
        ({"failed_by_reason": []}, "failed_by_reason must map"),
        ({"files": 3}, "TypeError"),
        ({"more": 1}, "TypeError"),
        ({"files": [{"path": "../../x"}]}, "path must lie in the table's own folder images/, got '../../x'"),
        ({"files": [{"path": "images/../../x"}]}, "path must lie in the table's own folder"),
        ({"files": [{"table": "secrets"}]}, "table must be images or instances, got 'secrets'"),
    ],
)
def test_a_commit_that_someone_else_wrote_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    fields = json.loads(make_commit("a").to_json())
    if isinstance(change.get("files"), list):
        change = {"files": [fields["files"][0] | change["files"][0]]}
    storage.write_bytes(f"{tmp_path}/_commits/s1.json", json.dumps(fields | change).encode())
    with pytest.raises(CommitError, match=r"s1\.json is not a commit of this format: ") as raised:
        commits.read_commits(str(tmp_path))
    assert message in str(raised.value)

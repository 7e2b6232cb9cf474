"""What becomes of a call when a remote store, or the line to it, fails: the same for each of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import stamina

from pipeline import commits, storage
from pipeline.errors import ConfigError
from pipeline.retry import RETRY_AFTER_SECONDS
from pipeline.storage import join
from tests.conftest import FaultyStore
from tests.pipeline.s3_server import FaultyProxy
from tests.pipeline.test_commits import make_commit
from tests.pipeline.test_storage import names


@pytest.mark.parametrize("fault", ["503", "500", "reset", "lost"])
def test_calls_are_retried_counted_and_logged_once(
    faulty_store: FaultyStore, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    root, proxy = faulty_store
    uri = join(root, "x")
    calls: list[tuple[str, Callable[[], object], object]] = [
        ("write_bytes", lambda: storage.write_bytes(uri, b"content"), None),
        ("read_bytes", lambda: storage.read_bytes(uri), b"content"),
        ("read_range", lambda: storage.read_range(uri, 1, 3), b"ont"),
        ("info", lambda: storage.info(uri).size, 7),
        ("list_files", lambda: names(root), ["x"]),
        ("delete", lambda: storage.delete(uri), None),
    ]
    for name, call, expected in calls:
        before = storage.retry_count()
        caplog.clear()
        proxy.faults = [fault, fault, fault]
        assert call() == expected, name
        assert proxy.faults == []
        counted = storage.retry_count() - before
        # aiohttp asks once more by itself where a kept connection is lost, and gcsfs two questions at once for an info.
        assert counted == 3 or fault in ("reset", "lost") or (name == "info" and root.startswith("gs://")), name
        assert counted >= 1 or (name == "info" and root.startswith("gs://")), name
        ours = [record for record in caplog.records if record.name == "pipeline.retry"]
        assert [record.levelname for record in ours] == ["WARNING"] * min(counted, 1), name
    assert not storage.exists(uri)


def test_a_body_that_ends_early_is_asked_for_again(faulty_store: FaultyStore) -> None:
    root, proxy = faulty_store
    uri = join(root, "x")
    content = bytes(range(256)) * 1_000
    storage.write_bytes(uri, content)
    calls: list[tuple[Callable[[], object], object]] = [
        (lambda: storage.read_bytes(uri), content),
        (lambda: storage.read_range(uri, 1_000, 100_000), content[1_000:101_000]),
        (lambda: names(root), ["x"]),
    ]
    for call, expected in calls:
        proxy.faults = ["cut"]
        assert call() == expected
        assert proxy.faults == []


@pytest.mark.parametrize("faulty_store", ["s3", "az"], indirect=True)  # gcsfs drops the headers of an error
def test_a_throttled_call_waits_for_as_long_as_the_store_asks(
    faulty_store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, proxy = faulty_store
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=waits.append))
    proxy.faults = ["503+7", "503+9999", "503"]
    with stamina.set_testing(False):
        storage.write_bytes(join(root, "x"), b"content")
    assert 7 <= waits[0] <= 9
    assert RETRY_AFTER_SECONDS <= waits[1] <= RETRY_AFTER_SECONDS + 2
    assert 2 <= waits[2] <= 4  # our own third wait: 0.5 s doubled twice, and up to 2 s


def test_errors_outlive_the_retries(faulty_store: FaultyStore) -> None:
    root, proxy = faulty_store
    proxy.faults = ["503"] * 5
    with pytest.raises(OSError, match=re.escape(join(root, "x"))):
        storage.read_bytes(join(root, "x"))
    assert len(proxy.requests) == 5  # the client below us did not retry on its own


def test_absence_is_not_retried(faulty_store: FaultyStore) -> None:
    root, proxy = faulty_store
    before = storage.retry_count()
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(join(root, "x"))
    assert storage.retry_count() == before
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("fault", ["500", "503"])
def test_create_exclusive_is_one_attempt(faulty_store: FaultyStore, fault: str) -> None:
    root, proxy = faulty_store
    uri = join(root, "x")
    proxy.faults = [fault]
    with pytest.raises(OSError, match=re.escape(uri)):
        storage.create_exclusive(uri, b"mine")
    assert len(proxy.requests) == 1
    assert not storage.exists(uri)


@pytest.mark.parametrize(
    "faults", [["reset"], ["lost"], ["cut"], ["reset", "reset"], ["lost", "lost"], ["lost", "reset"]], ids="-".join
)
def test_create_exclusive_never_claims_what_it_did_not_create(faulty_store: FaultyStore, faults: list[str]) -> None:
    root, proxy = faulty_store
    uri = join(root, "x")
    proxy.faults = list(faults)
    try:
        won = storage.create_exclusive(uri, b"mine")
    except OSError:
        won = False
    assert len(proxy.requests) <= 2  # aiohttp sends a PUT again, once, after a broken connection
    created = won or faults[0] in ("lost", "cut")
    proxy.faults = []
    assert storage.exists(uri) == created
    assert not created or storage.read_bytes(uri) == b"mine"
    assert storage.create_exclusive(uri, b"again") == (not created)


@pytest.mark.parametrize("faults", [["503"], ["", "503"], ["lost"], ["", "lost"], ["reset", "503"]], ids="-".join)
def test_the_probe_outlives_a_throttled_store(faulty_store: FaultyStore, faults: list[str]) -> None:
    root, proxy = faulty_store
    proxy.faults = list(faults)
    assert storage.honours_create_exclusive(root)
    assert proxy.faults == []
    assert names(root) == []


@pytest.mark.parametrize("faulty_store", ["s3", "gs"], indirect=True)  # for Azure's client a 409 says that it exists
def test_a_conflict_is_neither_won_nor_lost(faulty_store: FaultyStore) -> None:
    faulty_store.proxy.faults = ["409"]
    with pytest.raises(storage.StoreConflict):
        storage.create_exclusive(join(faulty_store.root, "x"), b"mine")


@pytest.mark.parametrize(
    "faults",
    [
        ["lost"],
        ["reset"],
        ["409"],
        ["412"],
        ["503"],
        ["cut"],
        ["lost", "lost"],
        ["409", "lost"],
        ["lost", "503", "503"],
        ["500", "", "lost"],
    ],
    ids="-".join,
)
def test_a_lossy_line_gives_one_winner(faulty_store: FaultyStore, faults: list[str]) -> None:
    root, proxy = faulty_store
    proxy.faults = list(faults)
    assert commits.publish(root, make_commit("a"), exclusive=True) == "won"
    proxy.faults = list(faults)
    assert commits.publish(root, make_commit("b"), exclusive=True) == "lost"
    proxy.faults = []
    assert commits.read_commits(root) == [make_commit("a")]


def test_a_stale_listing_costs_work_and_nothing_else(faulty_store: FaultyStore) -> None:
    root, proxy = faulty_store
    assert commits.read_commits(root) == []
    assert commits.publish(root, make_commit("a"), exclusive=True) == "won"
    proxy.faults = ["stale"]
    assert commits.read_commits(root) == []  # so the shard is done again
    assert commits.publish(root, make_commit("b"), exclusive=True) == "lost"
    assert commits.read_commits(root) == [make_commit("a")]


@pytest.mark.parametrize("faulty_store", ["s3", "az"], indirect=True)
def test_a_throttled_commit_waits_for_as_long_as_the_store_asks(
    faulty_store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(commits, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: 0.0))
    faulty_store.proxy.faults = ["503+7"]
    assert commits.publish(faulty_store.root, make_commit("a"), exclusive=True) == "won"
    assert len(waits) == 1
    assert 7 <= waits[0] <= 9


def test_no_access_names_the_next_step(faulty_store: FaultyStore) -> None:
    faulty_store.proxy.faults = ["401"]
    with pytest.raises(ConfigError, match="no usable credentials"):
        storage.read_bytes(join(faulty_store.root, "x"))


def test_s3_reads_an_object_with_one_request(s3_root: str, faulty_s3: FaultyProxy) -> None:
    storage.write_bytes(join(s3_root, "x"), b"x")
    faulty_s3.requests.clear()
    storage.read_bytes(join(s3_root, "x"))
    assert len(faulty_s3.requests) == 1

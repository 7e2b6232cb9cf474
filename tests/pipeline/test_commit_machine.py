"""Actors, readers and plans over a store that fails as asked, one call to the store at a time.

The code is the real one, from ``SegmentActor.segment`` down to the client of a store; only the rows are made up. An
attempt runs on a thread of its own and stands still at each of its calls, so that what is called next, by whom, and
what comes of it, is Hypothesis's choice, and no two threads ever run at once.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import duckdb
import pytest
import stamina
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from model.structures import ImageSize
from pipeline import commits, results, storage
from pipeline.commits import Commit
from pipeline.errors import CommitError
from pipeline.results import Results
from pipeline.segment_actor import SegmentActor, Work
from pipeline.segmenter import Segmenter
from pipeline.shard_attempts import ActorConfig, ActorUse, Attempt
from pipeline.shards import Plan, Shard, ShardConfig
from pipeline.summary import new_run_id
from tests.pipeline.stepped_store import FAULTS, Clock, Dead, SteppedAttempt, SteppedStore
from tests.pipeline.test_results import METADATA, make_detections
from tests.pipeline.test_shards import listing

YEAR_AHEAD = "2999"
"""What the ids of runs begin with on a machine whose clock is far ahead."""

TRIES = 2
"""Of a call that is retried, before its error is raised."""

MAX_RUNS = 8
MAX_LIVING = 4

WHICH = st.integers(0, MAX_LIVING - 1)
CHANGED = st.none() | st.integers(0, 2)
"""Which image has changed since the last run, if one has."""


class MadeUpRows(SegmentActor):
    """An actor without pictures and model."""

    _model: Any = SimpleNamespace(use=ActorUse)

    def _fill(self, work: Work, attempt: Attempt) -> None:
        for index in range(work.rows.items.num_rows):
            work.rows.add_ok(index, ImageSize(4, 6), 1, 5, make_detections(num_instances(attempt.attempt_id)))


def num_instances(attempt_id: str) -> int:
    """In each image that the attempt segments: two attempts at a shard rarely find the same."""
    return int(attempt_id.removeprefix("a")) % 4


def no_model() -> Segmenter:
    raise AssertionError("rows are made up")


@cache
def the_database() -> Any:
    """One for all plans: to open one takes longer than whatever a plan of a few images does with it."""
    return duckdb.connect(":memory:", config={"threads": 1})


def connect_to_own_schema(database: Any, _: str = "", config: Any = None) -> Any:
    """In place of ``duckdb.connect``."""
    connection, schema = database.cursor(), f"s{uuid.uuid4().hex}"
    connection.execute(f"CREATE SCHEMA {schema}; USE {schema}")
    return connection


class Run(NamedTuple):
    """One run of ``maskline segment``."""

    actor: MadeUpRows
    shards: list[Shard]


class CommitMachine(RuleBasedStateMachine):
    """Runs plan, attempts advance or fail, images change; readers look on."""

    exclusive: ClassVar[bool] = True
    """The store honours create-only."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.clock = SteppedStore(), Clock()
        self.opened = ExitStack()
        patches = self.opened.enter_context(pytest.MonkeyPatch.context())
        patches.setattr(storage, "locate", lambda uri: (self.store, uri.removeprefix("gs://")))
        patches.setattr(commits, "time", self.clock)
        patches.setattr(duckdb, "connect", partial(connect_to_own_schema, the_database()))
        self.opened.enter_context(stamina.set_testing(True, attempts=TRIES))
        self.folder = self.opened.enter_context(TemporaryDirectory(prefix="maskline-machine-"))
        commits.create_table(self.folder)
        self.versions: dict[str, int] = {}
        """Of the images in the archive."""
        self.runs: list[Run] = []
        self.living: list[SteppedAttempt] = []
        self.num_attempts = 0
        self.issued_since_plan = False
        self.seen: dict[str, Commit] = {}
        """Shard id → its commit, as a reader saw it last."""
        self.written: dict[Path, int] = {}
        """When each committed file was written."""
        self.planned: dict[str, list[tuple[str, str]]] = {}
        """Shard id → key and version of each of its images."""

    # What happens

    @initialize(num_images=st.integers(1, 3))
    def fill_the_archive(self, num_images: int) -> None:
        self.versions = {f"k{index}": 0 for index in range(num_images)}
        self._start_a_run(None, images_per_shard=2, clock_ahead=False)

    @precondition(lambda self: len(self.runs) < MAX_RUNS and self.issued_since_plan)
    @rule(changed=CHANGED, images_per_shard=st.integers(1, 3), clock_ahead=st.booleans())
    def start_a_run(self, changed: int | None, images_per_shard: int, clock_ahead: bool) -> None:
        self._start_a_run(changed, images_per_shard, clock_ahead)

    @precondition(lambda self: len(self.runs) < MAX_RUNS)
    @rule(changed=CHANGED, images_per_shard=st.integers(1, 3), clock_ahead=st.booleans())
    def run_without_faults(self, changed: int | None, images_per_shard: int, clock_ahead: bool) -> None:
        """Whatever happened, and whoever is still about: one run more, and nothing is left to do."""
        actor, shards = self._start_a_run(changed, images_per_shard, clock_ahead)
        for shard in shards:
            outcome = actor.segment(shard, Attempt(attempt_id=self._next_id(), urgency=0))
            assert outcome.commit in ("won", "found")
        assert self._missing(self._visible(commits.read_commits(self.folder))) == []

    @precondition(lambda self: len(self.living) < MAX_LIVING and any(run.shards for run in self.runs))
    @rule(run=st.integers(0, 2), shard=st.integers(0, 2), count=st.integers(1, 2), up_to_the_commit=st.booleans())
    def issue(self, run: int, shard: int, count: int, up_to_the_commit: bool) -> None:
        """Also while another attempt at it lives, and after its commit. Runs count from the latest."""
        runs = [each for each in self.runs if each.shards]
        actor, shards = runs[-1 - run % len(runs)]
        for _ in range(count):
            attempt = SteppedAttempt(actor, shards[shard % len(shards)], self._next_id())
            self.living.append(attempt)
            while up_to_the_commit and attempt.wants not in ("commit", None):
                self._go(attempt)

    @precondition(lambda self: self.living)
    @rule(which=WHICH, to_the_end=st.booleans())
    def serve(self, which: int, to_the_end: bool) -> None:
        attempt = self.living[which % len(self.living)]
        self._go(attempt)
        while to_the_end and attempt.wants is not None:
            self._go(attempt)

    @precondition(lambda self: self._at("commit"))
    @rule(which=WHICH, fault=st.sampled_from(["sent twice", "answer lost", "dead after"]))
    def do_not_confirm_the_commit(self, which: int, fault: str) -> None:
        self._go_from("commit", which, fault)

    @precondition(lambda self: self._at("commit"))
    @rule(which=WHICH, fault=st.sampled_from(["request lost", "request delayed", "conflict", "throttled"]))
    def do_not_take_the_commit(self, which: int, fault: str) -> None:
        self._go_from("commit", which, fault)

    @precondition(lambda self: self._at("write"))
    @rule(which=WHICH, fault=st.sampled_from(["answer lost", "request lost", "request delayed"]))
    def fail_a_write(self, which: int, fault: str) -> None:
        self._go_from("write", which, fault)

    @precondition(lambda self: self._at("read"))
    @rule(which=WHICH, fault=st.sampled_from(["request lost", "throttled"]), time_is_up=st.booleans())
    def fail_a_read(self, which: int, fault: str, time_is_up: bool) -> None:
        self.clock.now += 2 * commits.COMMIT_BUDGET_SECONDS * time_is_up
        self._go_from("read", which, fault)

    @precondition(lambda self: len(self.living) > 1)
    @rule(which=WHICH)
    def let_one_die(self, which: int) -> None:
        self._go(self.living[which % len(self.living)], "dead before")

    @precondition(lambda self: self.store.delayed)
    @rule()
    def let_a_delayed_request_arrive(self) -> None:
        with suppress(FileExistsError):
            self.store.delayed.pop(0)()

    # What always holds

    @invariant()
    def readers_and_plans_follow_commits(self) -> None:
        committed = commits.read_commits(self.folder)
        found = {commit.shard_id: commit for commit in committed}
        if self.exclusive:
            assert {shard_id: found.get(shard_id) for shard_id in self.seen} == self.seen, "a commit changed"
        assert found.keys() >= self.seen.keys(), "a commit is gone"
        files = [Path(self.folder, file.path) for commit in committed for file in commit.files]
        written = {file: file.stat().st_mtime_ns for file in files}
        if (found, written) != (self.seen, self.written):  # else readers see what they saw, and plans ask the same
            self.seen, self.written = found, written
            visible = self._visible(committed)
            self._check_readers(visible)
            with self._open_plan(committed) as plan:
                self._check_plan(list(plan.shards()), visible)

    def _check_readers(self, visible: dict[str, tuple[str, str, int]]) -> None:
        """Each image of a commit once, and as many instances of it as its row says."""
        opened = results.open_results(self.folder)
        images, instances = opened.images().to_table(), opened.instances().to_table()
        columns = [images[name].to_pylist() for name in ("image_key", "run_id", "source_version", "num_instances")]
        assert sorted(zip(*columns, strict=True)) == sorted((key, *row) for key, row in visible.items())
        assert sum(columns[3]) == instances.num_rows
        assert Counter(instances["image_key"].to_pylist()) == {key: row[2] for key, row in visible.items() if row[2]}

    def _check_plan(self, shards: list[Shard], visible: dict[str, tuple[str, str, int]]) -> None:
        """All images without a row of their version, and no others."""
        planned = [key for shard in shards for key in shard.items["image_key"].to_pylist()]
        assert planned == self._missing(visible)

    def teardown(self) -> None:
        with self.opened:
            for attempt in self.living:
                attempt.go("dead before")

    # Parts of these

    def go_by_name(self, attempt_id: str, fault: str | None) -> None:
        """Nothing happens if it has ended."""
        for attempt in [each for each in self.living if each.attempt_id == attempt_id]:
            self._go(attempt, fault)

    def finish(self) -> None:
        """Let every living attempt come to its end."""
        while self.living:
            self._go(self.living[0])

    def _at(self, call: str) -> list[SteppedAttempt]:
        return [attempt for attempt in self.living if attempt.wants == call]

    def _go_from(self, call: str, which: int, fault: str) -> None:
        standing = self._at(call)
        self._go(standing[which % len(standing)], fault)

    def _go(self, attempt: SteppedAttempt, fault: str | None = None) -> None:
        attempt.go(fault)
        if attempt.wants is not None:
            return
        self.living.remove(attempt)
        if attempt.outcome is None:
            assert attempt.faults, f"it failed by itself: {attempt.error!r}"
            assert isinstance(attempt.error, Dead | CommitError | OSError), repr(attempt.error)
            return
        commit = commits.read_commit(self.folder, attempt.shard.shard_id)
        assert commit is not None
        assert (attempt.outcome.commit == "won") == (commit.attempt_id == attempt.attempt_id)

    def _start_a_run(self, changed: int | None, images_per_shard: int, clock_ahead: bool) -> Run:
        """As ``jobs/segment.py``: the id of a run is later than every commit that its plan has seen."""
        if changed is not None:
            self.versions[f"k{changed % len(self.versions)}"] ^= 1  # it also changes back
        committed = commits.read_table(self.folder)
        with self._open_plan(committed, images_per_shard) as plan:
            shards = list(plan.shards())
        self._check_plan(shards, self._visible(committed))
        for shard in shards:
            self.planned[shard.shard_id] = list(
                zip(shard.items["image_key"].to_pylist(), shard.items["source_version"].to_pylist(), strict=True)
            )
        run_id = new_run_id(max((commit.run_id for commit in committed), default=""))
        config = ActorConfig(
            output=f"gs://{self.folder}",
            run_id=YEAR_AHEAD + run_id[4:] if clock_ahead else run_id,
            score_threshold=0.5,
            metadata=METADATA,
            exclusive_commits=self.exclusive,
        )
        self.issued_since_plan = False
        self.runs.append(Run(MadeUpRows(no_model, config), shards))
        return self.runs[-1]

    def _open_plan(self, committed: list[Commit], images_per_shard: int = 2) -> Plan:
        return Plan(
            listing([(key, f"v{version}") for key, version in self.versions.items()]),
            Results(self.folder, committed),
            weights_sha256=METADATA.weights_sha256,
            settings_hash=METADATA.settings_hash,
            config=ShardConfig(images_per_shard=images_per_shard),
        )

    def _visible(self, committed: list[Commit]) -> dict[str, tuple[str, str, int]]:
        """Image key → run, version and number of instances, of the latest run's commit that holds it."""
        visible = {}
        for commit in sorted(committed, key=lambda commit: commit.run_id):
            for key, version in self.planned[commit.shard_id]:
                visible[key] = (commit.run_id, version, num_instances(commit.attempt_id))
        return visible

    def _missing(self, visible: dict[str, tuple[str, str, int]]) -> list[str]:
        """Keys of the images in the archive that have no row of their version."""
        return [key for key, version in self.versions.items() if key not in visible or visible[key][1] != f"v{version}"]

    def _next_id(self) -> str:
        self.num_attempts += 1
        self.issued_since_plan = True
        return f"a{self.num_attempts}"


class LastWriterMachine(CommitMachine):
    """The same on a store that ignores create-only: a commit may change, nothing else may."""

    exclusive = False


@pytest.mark.parametrize(("machine", "max_examples"), [(CommitMachine, 30), (LastWriterMachine, 10)])
def test_whatever_fails_readers_see_each_committed_image_once_and_one_more_run_does_the_rest(
    machine: type[CommitMachine], max_examples: int
) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=max_examples, stateful_step_count=30, deadline=None)
    )


@pytest.fixture
def machine() -> Iterator[CommitMachine]:
    machine = CommitMachine()
    yield machine
    machine.teardown()


def test_a_changed_image_is_done_again_after_a_run_whose_clock_was_ahead(machine: CommitMachine) -> None:
    machine.fill_the_archive(num_images=2)
    machine.run_without_faults(changed=None, images_per_shard=2, clock_ahead=True)
    machine.run_without_faults(changed=0, images_per_shard=2, clock_ahead=False)
    machine.readers_and_plans_follow_commits()


@pytest.mark.parametrize("second", [None, *FAULTS])
@pytest.mark.parametrize("first", [None, *FAULTS])
@pytest.mark.parametrize("who", ["a1", "a2"])
def test_two_attempts_at_one_commit_whatever_becomes_of_two_calls(
    machine: CommitMachine, who: str, first: str | None, second: str | None
) -> None:
    """From where both have written their files: one call of a1, one of either, and then all calls succeed."""
    machine.fill_the_archive(num_images=1)
    machine.issue(run=0, shard=0, count=2, up_to_the_commit=True)
    machine.go_by_name("a1", first)
    machine.readers_and_plans_follow_commits()
    machine.go_by_name(who, second)
    machine.finish()
    machine.readers_and_plans_follow_commits()

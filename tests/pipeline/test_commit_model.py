"""The commit protocol keeps its promises in every state that it can reach, and each protocol like it that we rejected
does not. The model is held against ``commits.publish`` call by call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest

from pipeline import commits, storage
from pipeline.errors import CommitError
from tests.pipeline.test_commits import make_commit
from tests.reference.commit_model import (
    ANSWERS,
    ENDED_BADLY,
    IMAGES,
    INSTANCES,
    NO_DEAD_END,
    PUBLISH,
    PUBLISH_WITHOUT_CREATE_ONLY,
    Broken,
    Move,
    Protocol,
    State,
    Step,
    Store,
    answers_are_true,
    committed_files_stay,
    create,
    look,
    moves,
    one_commit_for_ever,
    overwrite,
    put_over,
    read,
    search,
    write,
)

FILES_WRITTEN_BY_A = ["A looks, no commit", "A writes images", "A writes instances"]
FILES_WRITTEN_BY_B = ["B looks, no commit", "B writes images", "B writes instances"]


def with_steps(protocol: Protocol, **steps: Step) -> Protocol:
    """The protocol with some places changed or added; a place's name has blanks where the argument has underscores."""
    return replace(protocol, steps={**protocol.steps, **{name.replace("_", " "): step for name, step in steps.items()}})


def delete(whose: Literal["its", "others'"], *, then: str) -> Step:
    """Delete the data files of this attempt or of every other one."""

    def step(store: Store, me: int) -> Iterator[Move]:
        kept = frozenset(file for file in store.files if (file[1] == me) == (whose == "others'"))
        yield Move(f"deletes {whose} files", store._replace(files=kept), then)

    return step


def check_absent(*, absent: str, present: str) -> Step:
    """Ask whether the commit object exists."""

    def step(store: Store, me: int) -> Iterator[Move]:
        yield Move("checks, absent", store, absent) if store.commit is None else Move("checks, present", store, present)

    return step


def write_shared(table: str, *, then: str) -> Step:
    """Write a data file under a name that every attempt uses."""

    def step(store: Store, me: int) -> Iterator[Move]:
        others = {file for file in store.files if file[0] == table}
        yield Move(f"writes {table}", store._replace(files=(store.files - others) | {(table, me)}), then)

    return step


@pytest.mark.parametrize(("num_attempts", "reissue"), [(1, True), (2, True), (3, False)])
def test_the_protocol_keeps_its_promises_in_every_state(num_attempts: int, reissue: bool) -> None:
    assert search(PUBLISH, num_attempts, reissue=reissue).broken is None


@pytest.mark.parametrize("place", [*ANSWERS, *ENDED_BADLY])
def test_every_end_of_an_attempt_is_among_the_states(place: str) -> None:
    def never(state: State) -> bool:
        return all(where != place for _, where in state.attempts)

    assert search(PUBLISH, 2, promises=(never,)).broken is not None


def test_without_create_only_the_commit_changes_but_files_stay() -> None:
    assert search(PUBLISH_WITHOUT_CREATE_ONLY, 2, promises=(committed_files_stay,)).broken is None
    for promise in (one_commit_for_ever, answers_are_true):
        broken = search(PUBLISH_WITHOUT_CREATE_ONLY, 2, promises=(promise,)).broken
        assert broken is not None
        assert broken.promise == promise.__name__


def test_taking_412_for_a_loss_deletes_committed_files() -> None:
    """The client sent its PUT twice, or the first answer was lost."""
    rejected = with_steps(PUBLISH, create=create(refused="delete", unknown="create"), delete=delete("its", then="lost"))
    assert search(rejected, 2).broken == Broken(
        committed_files_stay.__name__, [*FILES_WRITTEN_BY_A, "A creates, 412 to its own write", "A deletes its files"]
    )


def test_taking_a_timeout_for_a_loss_denies_the_own_commit() -> None:
    assert search(with_steps(PUBLISH, create=create(unknown="lost")), 2).broken == Broken(
        answers_are_true.__name__, [*FILES_WRITTEN_BY_A, "A creates, no answer, written"]
    )


def test_a_commit_before_its_files_names_what_is_not_there() -> None:
    rejected = with_steps(
        PUBLISH,
        look=look(absent="create"),
        create=create(created="write images"),
        read=read(mine="write images"),
        write_instances=write(INSTANCES, then="won"),
    )
    assert search(rejected, 2).broken == Broken(committed_files_stay.__name__, ["A looks, no commit", "A creates"])


def test_cleaning_up_after_other_attempts_deletes_committed_files() -> None:
    """What B took for left-overs was committed while it went on from its look at the table."""
    rejected = with_steps(PUBLISH, look=look(absent="clean"), clean=delete("others'", then="write images"))
    a_begins, *a_writes = FILES_WRITTEN_BY_A
    assert search(rejected, 2).broken == Broken(
        committed_files_stay.__name__,
        [
            a_begins,
            "A deletes others' files",
            *a_writes,
            "B looks, no commit",
            "A creates",
            "B deletes others' files",
        ],
    )


def test_deleting_the_losers_files_is_harmless_only_where_the_first_commit_stays() -> None:
    delete_others = delete("others'", then="won")
    assert search(with_steps(PUBLISH, create=create(created="delete"), delete=delete_others), 2).broken is None
    rejected = with_steps(
        PUBLISH_WITHOUT_CREATE_ONLY,
        overwrite=overwrite(then="read"),
        read=read(mine="delete others", others="delete own", absent="overwrite"),
        delete_others=delete_others,
        delete_own=delete("its", then="lost"),
    )
    assert search(rejected, 2, promises=(committed_files_stay,)).broken == Broken(
        committed_files_stay.__name__,
        [
            *FILES_WRITTEN_BY_A,
            "B looks, no commit",
            "A overwrites",
            "A reads its own",
            "B writes images",
            "A deletes others' files",
            "B writes instances",
            "B overwrites",
        ],
    )


def test_a_check_before_a_plain_write_lets_two_attempts_commit() -> None:
    rejected = replace(
        with_steps(PUBLISH, create=check_absent(absent="overwrite", present="read"), overwrite=overwrite(then="won")),
        put=put_over,
    )
    assert search(rejected, 2).broken == Broken(
        one_commit_for_ever.__name__,
        [
            *FILES_WRITTEN_BY_A,
            "A checks, absent",
            *FILES_WRITTEN_BY_B,
            "B checks, absent",
            "A overwrites",
            "B overwrites",
        ],
    )


def test_names_that_attempts_share_are_overwritten_after_the_commit() -> None:
    rejected = with_steps(
        PUBLISH,
        write_images=write_shared(IMAGES, then="write instances"),
        write_instances=write_shared(INSTANCES, then="create"),
    )
    assert search(rejected, 2).broken == Broken(
        committed_files_stay.__name__, [*FILES_WRITTEN_BY_A, "B looks, no commit", "A creates", "B writes images"]
    )


def test_waiting_for_whom_a_409_means_is_a_dead_end() -> None:
    """Nobody else need be there: the conflict may have been with an attempt that has died."""
    rejected = with_steps(PUBLISH, create=create(conflict="wait"), wait=read(absent="wait"))
    assert search(rejected, 1, reissue=False).broken == Broken(NO_DEAD_END, [*FILES_WRITTEN_BY_A, "A creates, 409"])


# ------------------------------------------------------------------------------------- the model against the real code

MINE, OTHERS = make_commit("mine"), make_commit("others")
ANSWERS_TO_CREATE: dict[str, bool | OSError] = {
    "creates": True,
    "creates, 412": False,
    "creates, 412 to its own write": False,
    "creates, 409": storage.StoreConflict("409"),
    "creates, no answer, written": TimeoutError("no answer"),
    "creates, no answer, not written": TimeoutError("no answer"),
    "creates, no answer, under way": TimeoutError("no answer"),
}
ANSWERS_TO_READ: dict[str, bytes | OSError] = {
    "reads its own": MINE.to_json(),
    "reads another's": OTHERS.to_json(),
    "reads none": FileNotFoundError("none"),
    "reads, no answer": TimeoutError("no answer"),
}
TIME_IS_UP = ", time is up"


class ScriptedStore:
    """Answers call after call as a way through the model says. It is the clock too."""

    def __init__(self, events: tuple[str, ...]) -> None:
        self.left = list(events)
        self.now = 0.0

    def create_exclusive(self, uri: str, data: bytes) -> bool:
        assert (uri, data) == (commits.commit_uri("out", MINE.shard_id), MINE.to_json())
        answer = ANSWERS_TO_CREATE[self.left.pop(0)]
        if isinstance(answer, OSError):
            raise answer
        return answer

    def read_bytes(self, uri: str) -> bytes:
        assert uri == commits.commit_uri("out", MINE.shard_id)
        event = self.left.pop(0)
        if event.endswith(TIME_IS_UP):
            self.now += 2 * commits.COMMIT_BUDGET_SECONDS
        answer = ANSWERS_TO_READ[event.removesuffix(TIME_IS_UP)]
        if isinstance(answer, OSError):
            raise answer
        return answer

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def ways_to_an_answer(state: State, num_calls: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """What happens to attempt A in at most so many calls, and the place where that ends."""
    place = state.attempts[0][1]
    if place not in PUBLISH.steps:
        yield (), place
        return
    for event, following in moves(PUBLISH, state, reissue=False):
        if event.startswith("A ") and event != "A dies" and num_calls:
            for events, end in ways_to_an_answer(following, num_calls - 1):
                yield (event.removeprefix("A "), *events), end
        elif event.endswith("arrives"):
            yield from ways_to_an_answer(following, num_calls)


@pytest.mark.parametrize(
    ("store", "ends"),
    [
        (Store(), {"won", "failed"}),
        (Store(commit=1, ever_named=frozenset({1})), {"lost", "failed"}),
        (Store(under_way=frozenset({1})), {"won", "lost", "failed"}),
    ],
    ids=["alone", "after another's commit", "while another's is under way"],
)
def test_publish_does_what_the_model_does(store: Store, ends: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the store may answer to its first four calls: two creations, each with its reading."""
    ways = dict(ways_to_an_answer(State(store, ((0, "create"), (1, "dead"))), 4))
    assert set(ways.values()) == ends
    for events, end in ways.items():
        script = ScriptedStore(events)
        monkeypatch.setattr(storage, "create_exclusive", script.create_exclusive)
        monkeypatch.setattr(storage, "read_bytes", script.read_bytes)
        monkeypatch.setattr(commits, "time", script)
        try:
            answer: str = commits.publish("out", MINE, exclusive=True)
        except CommitError:
            answer = "failed"
        assert (answer, script.left) == (end, []), events

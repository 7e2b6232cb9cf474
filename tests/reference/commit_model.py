"""The commit protocol as a graph of states, searched whole: every order of steps, every lost answer, every crash.

A ``Protocol`` enters; how many states it has, and the shortest way to a broken promise if there is one, leave. The
graph is of one shard, which is all that one commit is about. An attempt is at a place of its protocol, and each place
stands for one call of the code to its store. In ``PUBLISH``, the protocol as it is:

    look               segment_actor.segment: ``found = commits.read_commit(...)``; what it finds is the answer "found"
    write images       segment_actor._publish: ``results.write_table(...)``, the first of two
    write instances    segment_actor._publish: ``results.write_table(...)``, the second
    create             commits.publish: ``if storage.create_exclusive(uri, data): return "won"``
    read               commits.publish: ``winner = read_commit(...)``, ``return "won" if winner.attempt_id == ...``,
                       and where it found none, ``if time.monotonic() > deadline: raise CommitError``

``commits.begin_attempt`` is left out: nothing that is promised here depends on its trace. An attempt ends at an answer
("found", "won", "lost"), at "failed" (its error reached the driver) or at "dead" (its process is gone). After the last
two the driver issues the shard again, once here, as another attempt with another id.

The store reads what was written last. A PUT may be written and its answer lost, not written and its answer lost, or
still under way when its client gives up on it, and arrive at any later time. Its client may also have sent it twice,
so that a PUT which was written is answered 412. Data files under way are left out: they arrive under a name and with
bytes that are their attempt's alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

IMAGES, INSTANCES = "images", "instances"
ANSWERS = ("found", "won", "lost")
ENDED_BADLY = ("failed", "dead")


class Store(NamedTuple):
    """What lies in the store, attempts by their numbers."""

    commit: int | None = None
    """Whom the commit object names."""
    ever_named: frozenset[int] = frozenset()
    """Whom it named at any time: a reader may still follow it."""
    files: frozenset[tuple[str, int]] = frozenset()
    """Table and attempt of each data file."""
    under_way: frozenset[int] = frozenset()
    """Whose PUT of the commit object may yet arrive."""


class State(NamedTuple):
    """The store and where each attempt is."""

    store: Store
    attempts: tuple[tuple[int, str], ...]
    """Number and place. The number of an attempt issued again is its forerunner's plus the count of attempts."""


class Move(NamedTuple):
    """One thing that may happen at a place."""

    event: str
    store: Store
    place: str


Step = Callable[[Store, int], Iterator[Move]]
Put = Callable[[Store, int], Store]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A program that every attempt runs."""

    steps: Mapping[str, Step]
    """Place → what may happen there. An attempt begins at "look"."""
    put: Put
    """What a PUT of the commit object does when it arrives."""


def put_new(store: Store, me: int) -> Store:
    """PUT with If-None-Match: *."""
    return store if store.commit is not None else put_over(store, me)


def put_over(store: Store, me: int) -> Store:
    """PUT without a condition."""
    return store._replace(commit=me, ever_named=store.ever_named | {me})


def look(*, absent: str) -> Step:
    """Is there a commit already? An error that outlives the retries of the read ends the attempt."""

    def step(store: Store, me: int) -> Iterator[Move]:
        yield Move("looks, no commit", store, absent) if store.commit is None else Move("finds it", store, "found")
        yield Move("looks, no answer", store, "failed")

    return step


def write(table: str, *, then: str) -> Step:
    """Write a data file, again and again while no answer comes."""

    def step(store: Store, me: int) -> Iterator[Move]:
        written = store._replace(files=store.files | {(table, me)})
        yield Move(f"writes {table}", written, then)
        yield Move(f"writes {table}, no answer, written", written, f"write {table}")
        yield Move(f"writes {table}, no answer, time is up", store, "failed")

    return step


def create(*, created: str = "won", refused: str = "read", unknown: str = "read", conflict: str = "read") -> Step:
    """Create the commit object, in one PUT that only a free name takes.

    Args:
        created, refused, unknown, conflict: where success leads, the answer 412, no answer, and the answer 409.
    """

    def step(store: Store, me: int) -> Iterator[Move]:
        written = put_new(store, me)
        if store.commit is None:
            yield Move("creates", written, created)
            yield Move("creates, 412 to its own write", written, refused)
            yield Move("creates, no answer, written", written, unknown)
        else:
            yield Move("creates, 412", store, refused)
        yield Move("creates, no answer, not written", store, unknown)
        yield Move("creates, no answer, under way", store._replace(under_way=store.under_way | {me}), unknown)
        yield Move("creates, 409", store, conflict)

    return step


def overwrite(*, then: str) -> Step:
    """PUT the commit object whatever is there, again and again while no answer comes."""

    def step(store: Store, me: int) -> Iterator[Move]:
        written = put_over(store, me)
        yield Move("overwrites", written, then)
        yield Move("overwrites, no answer, written", written, "overwrite")
        yield Move("overwrites, no answer, under way", store._replace(under_way=store.under_way | {me}), "overwrite")
        yield Move("overwrites, no answer, time is up", store, "failed")

    return step


def read(*, mine: str = "won", others: str = "lost", absent: str = "create") -> Step:
    """Whose commit is there? Nobody's, and no answer, are tried again until the time is up."""

    def step(store: Store, me: int) -> Iterator[Move]:
        if store.commit == me:
            yield Move("reads its own", store, mine)
        elif store.commit is not None:
            yield Move("reads another's", store, others)
        else:
            yield Move("reads none", store, absent)
            yield Move("reads none, time is up", store, "failed")
        yield Move("reads, no answer", store, absent)
        yield Move("reads, no answer, time is up", store, "failed")

    return step


PUBLISH = Protocol(
    steps={
        "look": look(absent="write images"),
        "write images": write(IMAGES, then="write instances"),
        "write instances": write(INSTANCES, then="create"),
        "create": create(),
        "read": read(),
    },
    put=put_new,
)
"""``commits.publish`` where the store honours create-only."""

PUBLISH_WITHOUT_CREATE_ONLY = Protocol(
    steps={**PUBLISH.steps, "write instances": write(INSTANCES, then="overwrite"), "overwrite": overwrite(then="won")},
    put=put_over,
)
"""``commits.publish`` with ``exclusive=False``."""


def one_commit_for_ever(state: State) -> bool:
    """What the commit object named first, it names still."""
    return state.store.ever_named == frozenset({state.store.commit} - {None})


def committed_files_stay(state: State) -> bool:
    """Whoever follows a commit, however long ago it was read, finds its files."""
    return all((table, who) in state.store.files for who in state.store.ever_named for table in (IMAGES, INSTANCES))


def answers_are_true(state: State) -> bool:
    """An attempt that has won is named by the commit; one that lost, or found the work done, sees another named."""
    commit = state.store.commit
    return all(
        commit == number if place == "won" else commit not in (None, number)
        for number, place in state.attempts
        if place in ANSWERS
    )


Promise = Callable[[State], bool]
PROMISES: tuple[Promise, ...] = (one_commit_for_ever, committed_files_stay, answers_are_true)

NO_DEAD_END = "no_dead_end"
"""While an attempt lives or may be issued again, the shard can still be committed. Of the whole graph, not a state."""


class Broken(NamedTuple):
    """A promise that is not kept, and the shortest way there."""

    promise: str
    events: list[str]


class Searched(NamedTuple):
    num_states: int
    num_moves: int
    broken: Broken | None


def moves(protocol: Protocol, state: State, *, reissue: bool = True) -> Iterator[tuple[str, State]]:
    """All that may happen next."""
    store, attempts = state
    for slot, (number, place) in enumerate(attempts):

        def after(changed: Store, number: int, place: str, slot: int = slot) -> State:
            return State(changed, (*attempts[:slot], (number, place), *attempts[slot + 1 :]))

        name = name_of(number, len(attempts))
        if place in protocol.steps:
            for move in protocol.steps[place](store, number):
                yield f"{name} {move.event}", after(move.store, number, move.place)
            yield f"{name} dies", after(store, number, "dead")
        elif reissue and place in ENDED_BADLY and number == slot:
            yield f"{name} is issued again", after(store, number + len(attempts), "look")
    for number in sorted(store.under_way):
        arrived = protocol.put(store, number)._replace(under_way=store.under_way - {number})
        yield f"{name_of(number, len(attempts))}'s PUT arrives", State(arrived, attempts)


def name_of(number: int, num_attempts: int) -> str:
    """A, B, C; and A2, B2, C2 once issued again."""
    return "ABC"[number % num_attempts] + "2" * (number >= num_attempts)


def search(
    protocol: Protocol, num_attempts: int, *, reissue: bool = True, promises: tuple[Promise, ...] = PROMISES
) -> Searched:
    """All states that attempts reach from an empty store. Breadth first: the way to a broken promise is a shortest."""
    start = State(Store(), tuple((number, "look") for number in range(num_attempts)))
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    reached_from: dict[State, list[State]] = {}
    waiting, num_moves = deque([start]), 0
    while waiting:
        state = waiting.popleft()
        for event, following in moves(protocol, state, reissue=reissue):
            num_moves += 1
            reached_from.setdefault(following, []).append(state)
            if following in came_from:
                continue
            came_from[following] = (state, event)
            waiting.append(following)
            for promise in promises:
                if not promise(following):
                    return Searched(len(came_from), num_moves, Broken(promise.__name__, _way_to(following, came_from)))
    hopeful = _all_before([state for state in came_from if state.store.commit is not None], reached_from)
    for state in came_from:
        if state not in hopeful and _is_unfinished(protocol, state, reissue=reissue):
            return Searched(len(came_from), num_moves, Broken(NO_DEAD_END, _way_to(state, came_from)))
    return Searched(len(came_from), num_moves, None)


def _is_unfinished(protocol: Protocol, state: State, *, reissue: bool) -> bool:
    """Some attempt lives, or may be issued again."""
    return any(
        place in protocol.steps or (reissue and place in ENDED_BADLY and number == slot)
        for slot, (number, place) in enumerate(state.attempts)
    )


def _all_before(goals: list[State], reached_from: Mapping[State, list[State]]) -> set[State]:
    """The goals and every state from which one of them can be reached."""
    found, waiting = set(goals), list(goals)
    while waiting:
        for state in reached_from.get(waiting.pop(), ()):
            if state not in found:
                found.add(state)
                waiting.append(state)
    return found


def _way_to(state: State, came_from: Mapping[State, tuple[State, str] | None]) -> list[str]:
    events = []
    step = came_from[state]
    while step is not None:
        state, event = step
        events.append(event)
        step = came_from[state]
    return events[::-1]

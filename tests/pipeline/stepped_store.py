"""A store whose every call stands still until a test says what becomes of it.

Attempts run on threads of their own, each only between ``go`` and its next call to the store: what is called next, by
whom, and how it ends, is the test's choice, and no two threads run at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.segment_actor import SegmentActor
from pipeline.shard_attempts import Attempt, ShardOutcome
from pipeline.shards import Shard

HANG_SECONDS = 30.0
"""A thread that does not come to its next call for so long is a fault of this test."""


class StoreError(OSError):
    """An answer of the store that is not success, as its client raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"answered {status}")
        self.status = status


class Dead(BaseException):
    """The process is gone: no handler of errors runs in it."""


class Fault(NamedTuple):
    """What becomes of one call."""

    done: Literal["now", "later", "never"]
    error: Callable[[], BaseException]


FAULTS = {
    "answer lost": Fault("now", TimeoutError),
    "request delayed": Fault("later", TimeoutError),
    "request lost": Fault("never", TimeoutError),
    "throttled": Fault("never", partial(StoreError, 503)),
    "conflict": Fault("never", partial(StoreError, 409)),
    "sent twice": Fault("now", partial(StoreError, 412)),
    "dead before": Fault("never", Dead),
    "dead after": Fault("now", Dead),
}


class SteppedAttempt(threading.Thread):
    """One attempt at one shard. It runs only between ``go`` and its next call to the store."""

    def __init__(self, actor: SegmentActor, shard: Shard, attempt_id: str) -> None:
        super().__init__(name=attempt_id, daemon=True)
        self.shard, self.attempt_id = shard, attempt_id
        self.wants: str | None = None
        """Its pending call: "read", "write" or "commit"; None once it has ended."""
        self.faults: list[str] = []
        self.outcome: ShardOutcome | None = None
        self.error: BaseException | None = None
        self._actor = actor
        self._fault: Fault | None = None
        self._stands, self._goes = threading.Semaphore(0), threading.Semaphore(0)
        self.start()
        self._wait()

    def run(self) -> None:
        try:
            self.outcome = self._actor.segment(self.shard, Attempt(attempt_id=self.attempt_id, urgency=0))
        except BaseException as error:  # whatever it is, the machine judges it
            self.error = error
        self.wants = None
        self._stands.release()

    def stand_at(self, call: str) -> Fault | None:
        """Called by the store on this thread: what shall become of this call?"""
        self.wants = call
        self._stands.release()
        assert self._goes.acquire(timeout=HANG_SECONDS)
        return self._fault

    def go(self, fault: str | None = None) -> None:
        """Let its call have this fault, or none, and the attempt run to its next call or its end."""
        if fault is not None:
            self.faults.append(fault)
        self._fault = None if fault is None else FAULTS[fault]
        self._goes.release()
        self._wait()

    def _wait(self) -> None:
        assert self._stands.acquire(timeout=HANG_SECONDS), f"{self.name} hangs"


class SteppedStore:
    """A client of a store, as ``pipeline.storage`` uses one, over a local folder."""

    def __init__(self) -> None:
        self.delayed: list[Callable[[], None]] = []

    def cat_file(self, path: str, *, start: int | None, end: int | None) -> bytes:
        assert start is None
        assert end is None
        self._serve("read", lambda: None)
        return Path(path).read_bytes()

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite", **_: object) -> None:
        def put() -> None:
            if mode == "create" and Path(path).exists():
                raise FileExistsError(path)
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(data)

        self._serve("commit" if "_commits" in Path(path).parts else "write", put)

    def rm_file(self, path: str) -> None:
        self._serve("write", Path(path).unlink)

    def _serve(self, call: str, do: Callable[[], None]) -> None:
        attempt = threading.current_thread()
        fault = attempt.stand_at(call) if isinstance(attempt, SteppedAttempt) else None
        if fault is None:
            do()
            return
        if fault.done == "now":
            with suppress(FileExistsError):
                do()
        elif fault.done == "later":
            self.delayed.append(do)
        raise fault.error()


class Clock:
    """In place of ``commits.time``: sleeping takes no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

"""What is kept and said of a training run: a record of each step and evaluation, lines of text, warnings, TensorBoard.

Records enter; JSON lines, one-line reports and TensorBoard's event files at ``<output>/tensorboard/`` leave. A step is
counted from 0 in a record and in TensorBoard, and shown to people as how many are done.
"""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from statistics import fmean, median
from typing import Any

from PIL import Image

from pipeline import storage

_QUIET_STEPS = 20  # no warning before
_BLOCK = 10  # steps whose median stands for the loss at a time
_RISE_STEPS = 200  # within which the loss may have been low
_PLATEAU_STEPS = 200  # after which the loss should have fallen
_PLATEAU_SHARE = 0.95  # of the first loss
_GRAD_RISE = 20.0
_GRAD_FLOOR = 10.0  # a norm below harms nothing
_RECENT = 50
_STARVED_SHARE = 0.2  # of the time of a step
_EVENT_FILE_BYTES = 8 * 2**20  # beyond, the next file is begun: each is written whole on each flush


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step."""

    step: int
    """From 0."""
    epoch: float
    """Images seen per image of the dataset."""
    losses: dict[str, float]
    """By part: rpn_objectness, rpn_box, class, box, mask, keypoint – those the network has."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    images: int
    """In the global batch."""
    seconds: float
    """Wall time of the step."""
    data_seconds: float
    """Of it, waiting for the next batch."""
    memory_bytes: int
    """Peak of the accelerator, or the resident set of the process on a CPU."""
    unreadable: int = 0
    """Images that could not be decoded."""

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The scores of the weights as one step left them."""

    step: int
    """The last one before it, from 0."""
    epoch: float
    scores: dict[str, float]
    """By name, such as ``segm AP``, in 0..1."""


@dataclass
class History:
    """All records of a run, in the order of their steps."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)

    def add(self, record: StepRecord | EvaluationRecord) -> None:
        records: list[Any] = self.steps if isinstance(record, StepRecord) else self.evaluations
        if records and record.step <= records[-1].step:
            last = records[-1].step
            raise ValueError(f"step {record.step} comes after step {last}; cut({record.step}) the history first")
        records.append(record)

    def cut(self, step: int) -> None:
        """Drop what is at or after ``step``: a resumed run does it again."""
        self.steps = [record for record in self.steps if record.step < step]
        self.evaluations = [record for record in self.evaluations if record.step < step]

    def to_json_lines(self) -> bytes:
        """One object a line with its ``kind``, an evaluation after its step."""
        lines = [(record.step, json.dumps({"kind": "step", **vars(record)})) for record in self.steps]
        lines += [(record.step, json.dumps({"kind": "evaluation", **vars(record)})) for record in self.evaluations]
        return "".join(f"{line}\n" for _, line in sorted(lines, key=lambda pair: pair[0])).encode()  # stable

    @classmethod
    def from_json_lines(cls, data: bytes) -> History:
        history = cls()
        for number, line in enumerate(data.splitlines(), 1):
            values = json.loads(line)
            kind = values.pop("kind", None)
            if kind not in ("step", "evaluation"):
                raise ValueError(f'line {number} of a training history is of kind {kind!r}, not "step" or "evaluation"')
            history.add(StepRecord(**values) if kind == "step" else EvaluationRecord(**values))
        return history


def step_line(records: Sequence[StepRecord], *, num_steps: int) -> str:
    """The records since the last line in one: means of losses and times, the last learning rate, the peak of memory."""
    if not records:
        raise ValueError("a line about steps needs at least one record")
    last, seconds = records[-1], sum(record.seconds for record in records)
    left = num_steps - last.step - 1
    texts = [
        f"step {last.step + 1}/{num_steps}",
        f"epoch {last.epoch:.1f}",
        f"loss {_short(fmean(record.loss for record in records), 4)} "
        f"({' '.join(f'{name} {_short(loss, 2)}' for name, loss in _mean_parts(records).items())})",
        f"lr {_short(last.learning_rate, 3)}",
        f"{_short(sum(record.images for record in records) / max(seconds, 1e-9), 3)} img/s",
        f"data {100 * sum(record.data_seconds for record in records) / max(seconds, 1e-9):.0f} %",
        f"ETA {_duration(left * seconds / len(records))}",
        f"{max(record.memory_bytes for record in records) / 2**30:.1f} GiB",
    ]
    unreadable = sum(record.unreadable for record in records)
    return "  ".join([*texts, f"{unreadable} unreadable"] if unreadable else texts)


def evaluation_line(record: EvaluationRecord) -> str:
    scores = [f"{name} {score:.3f}" for name, score in record.scores.items()]
    return "  ".join([f"evaluation after step {record.step + 1}", f"epoch {record.epoch:.1f}", *scores])


def warnings_of(history: History) -> list[str]:
    """What seems wrong with a run and what to do, at most one of a kind; nothing of a healthy one, however noisy."""
    steps = history.steps
    if len(steps) <= _QUIET_STEPS:
        return []
    found = [_rising_loss(steps) or _standing_loss(steps), _exploding_gradient(steps), _starved(steps)]
    return [warning for warning in found if warning is not None]


class TensorBoardLog:
    """Scalars and pictures for TensorBoard, on any store. Nothing is written before ``flush``.

    We frame the events ourselves: tensorboardX's SummaryWriter hands them to a thread, so that its ``flush`` returns
    before they are in the file.
    """

    def __init__(self, output_uri: str, *, purge_step: int | None = None) -> None:
        """``purge_step``: the first step that a resumed run does again; TensorBoard hides what older files say of it
        and of later ones."""
        self._folder = storage.join(output_uri, "tensorboard")
        self._dirty = False
        self._begin_file()
        if purge_step is not None:
            from tensorboardX.proto.event_pb2 import SessionLog

            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, record: StepRecord | EvaluationRecord) -> None:
        if isinstance(record, StepRecord):
            values = {f"loss/{name}": loss for name, loss in {"total": record.loss, **record.losses}.items()}
            values["optimiser/learning_rate"] = record.learning_rate
            values["optimiser/grad_norm"] = record.grad_norm
            values["speed/images_per_second"] = record.images / max(record.seconds, 1e-9)
            values["speed/data_share"] = record.data_seconds / max(record.seconds, 1e-9)
            values["speed/memory_gib"] = record.memory_bytes / 2**30
        else:
            values = {f"score/{name}": score for name, score in record.scores.items()}
        self._summarise(record.step, [{"tag": tag, "simple_value": value} for tag, value in values.items()])

    def add_image(self, tag: str, image: bytes, step: int) -> None:
        """``image``: a PNG, as ``training_pictures`` makes them."""
        from tensorboardX.proto.summary_pb2 import Summary

        width, height = Image.open(BytesIO(image)).size
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=image)
        self._summarise(step, [{"tag": tag, "image": picture}])

    def flush(self) -> None:
        if not self._dirty:
            return
        storage.write_bytes(self._uri, bytes(self._data))
        self._dirty = False
        if len(self._data) > _EVENT_FILE_BYTES:
            self._begin_file()

    close = flush

    def _begin_file(self) -> None:
        # TensorBoard reads the files of a folder in the order of their names.
        self._uri = storage.join(self._folder, f"events.out.tfevents.{time.time_ns()}")
        self._data = bytearray()
        self._write(file_version="brain.Event:2")
        self._dirty = False  # nothing but a version is not worth a file

    def _summarise(self, step: int, values: list[dict[str, Any]]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(step=step, summary=Summary(value=[Summary.Value(**value) for value in values]))

    def _write(self, **values: Any) -> None:
        """Append an event as a TFRecord: length, its checksum, data, their checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        data = Event(wall_time=time.time(), **values).SerializeToString()
        length = struct.pack("<Q", len(data))
        self._data += length + struct.pack("<I", masked_crc32c(length))
        self._data += data + struct.pack("<I", masked_crc32c(data))
        self._dirty = True


def _mean_parts(records: Sequence[StepRecord]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record.losses)
    return {name: fmean(record.losses[name] for record in records if name in record.losses) for name in names}


def _rising_loss(steps: Sequence[StepRecord]) -> str | None:
    """Both of the last two blocks lie at twice the lowest one or more.

    Above the first loss, or else at three times the lowest: before the RPN finds the first objects there is little
    to lose in the heads, and the loss of a sound run dips.
    """
    recent = steps[-_RISE_STEPS:]
    starts = range(len(recent) % _BLOCK, len(recent), _BLOCK)
    medians = [median(record.loss for record in recent[start : start + _BLOCK]) for start in starts]
    if len(medians) < 3:
        return None
    lowest = min(reversed(range(len(medians))), key=medians.__getitem__)
    low, first = medians[lowest], median(record.loss for record in steps[:_BLOCK])
    if min(medians[-2:]) <= max(2 * low, min(first, 3 * low)):
        return None
    since = recent[starts[lowest] :]
    rate = max(record.learning_rate for record in since)
    return (
        f"the loss has risen from {_short(low, 2)} to {_short(medians[-1], 2)} over the last {len(since)} steps: "
        f"the learning rate {rate:.3g} is likely too high; try {0.3 * rate:.1g}"
    )


def _standing_loss(steps: Sequence[StepRecord]) -> str | None:
    first = median(record.loss for record in steps[:_QUIET_STEPS])
    now = median(record.loss for record in steps[-_RECENT:])
    if len(steps) < _PLATEAU_STEPS or not now > _PLATEAU_SHARE * first:
        return None
    return (
        f"the loss has not fallen in {len(steps)} steps, from {_short(first, 3)} to {_short(now, 3)}: look at the "
        f"pictures of the ground truth, or try another learning rate than {steps[-1].learning_rate:.3g}"
    )


def _exploding_gradient(steps: Sequence[StepRecord]) -> str | None:
    if len(steps) < 2 * _QUIET_STEPS:
        return None
    before = median(record.grad_norm for record in steps[:-_QUIET_STEPS])
    now = median(record.grad_norm for record in steps[-_QUIET_STEPS:])
    if not now > max(_GRAD_RISE * before, _GRAD_FLOOR):
        return None
    return (
        f"the gradient norm has risen from {_short(before, 2)} to {_short(now, 2)}: "
        f"clip it, or try a lower learning rate than {steps[-1].learning_rate:.3g}"
    )


def _starved(steps: Sequence[StepRecord]) -> str | None:
    """By time rather than by the median step: a loader that falls behind stalls every few steps."""
    recent = sorted(steps[-_RECENT:], key=lambda record: record.data_seconds)[:-1]  # one long wait is an accident
    share = sum(record.data_seconds for record in recent) / max(sum(record.seconds for record in recent), 1e-9)
    if not share > _STARVED_SHARE:
        return None
    return (
        f"the loader is slow: {100 * share:.0f} % of the last {len(recent) + 1} steps was spent waiting for images; "
        "raise --loader-processes"
    )


def _short(value: float, digits: int) -> str:
    """To so many significant digits, plain where people read plain numbers."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _duration(seconds: float) -> str:
    """The two largest units."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole_seconds:02d}s" if minutes else f"{whole_seconds}s"

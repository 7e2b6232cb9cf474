"""What a training run writes and says, by its first worker: records, curves, TensorBoard, weights, lines.

OUT/metrics.jsonl, curves.png, tensorboard/      every step and evaluation
OUT/best.safetensors, weights.safetensors        the best by the main score, and the last
OUT/predictions.png                              ground truth beside predictions
OUT/checkpoints/                                 written by checkpoints.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline import storage
from pipeline.training_log import (
    EvaluationRecord,
    History,
    StepRecord,
    TensorBoardLog,
    evaluation_line,
    step_line,
    warnings_of,
)
from pipeline.training_pictures import curves

CURVES_EVERY_SECONDS = 300.0
"""At least, between two drawings of the curves."""

Say = Callable[[str, Any], None]
"""A kind, "line", "stopped" or "result", and what is said."""


class TrainingOutput:
    """The records of a run; only the worker that may `say` writes and speaks."""

    def __init__(self, output: str, *, num_steps: int, lines_every: int, say: Say | None) -> None:
        self.history = History()
        self._output, self._num_steps, self._lines_every, self._say = output, num_steps, lines_every, say
        self._began = time.monotonic()
        self._since_line: list[StepRecord] = []
        self._warned: set[str] = set()
        self._drawn_at = 0.0
        self._board: TensorBoardLog | None = None
        self._purge_step = 0

    def restore(self, history: bytes, *, step: int) -> None:
        """Go on after the records of an earlier attempt."""
        self.history = History.from_json_lines(history)
        self.history.cut(step)
        self._purge_step = step
        self._line(f"going on from the checkpoint of step {step}")

    def add(self, record: StepRecord) -> None:
        """A step is done."""
        self.history.add(record)
        if self._say is None:
            return
        self._tensorboard().add(record)
        self._since_line.append(record)
        if (record.step + 1) % self._lines_every == 0 or record.step + 1 == self._num_steps:
            self._line(step_line(self._since_line, num_steps=self._num_steps))
            self._since_line = []
            self._warn()
            if time.monotonic() - self._drawn_at > CURVES_EVERY_SECONDS:
                self._write_records()

    def evaluated(self, record: EvaluationRecord, *, picture: bytes | None, weights: Callable[[], bytes]) -> None:
        """An evaluation is done; its weights are kept if they are the best so far."""
        best = self.best()
        self.history.add(record)
        self._line(evaluation_line(record))
        self._tensorboard().add(record)
        if picture is not None:
            storage.write_bytes(storage.join(self._output, "predictions.png"), picture)
            self._tensorboard().add_image("predictions", picture, record.step)
        if best is None or main_score(record) > main_score(best):
            storage.write_bytes(storage.join(self._output, "best.safetensors"), weights())
        self._write_records()

    def best(self) -> EvaluationRecord | None:
        """The evaluation with the highest main score."""
        return max(self.history.evaluations, key=main_score, default=None)

    def flush(self) -> None:
        """Write what has been recorded."""
        self._write_records()

    def stop(self, reason: str) -> None:
        """The run ends before its last step."""
        if self._say is not None:
            self._say("stopped", reason)

    def finish(self, weights: bytes) -> None:
        """Write the last weights and say what came of the run."""
        uri = storage.join(self._output, "weights.safetensors")
        storage.write_bytes(uri, weights)
        self._write_records()
        last, best = self.history.evaluations[-1:], self.best()
        if self._say is not None:
            result = {
                "steps": self._num_steps,
                "seconds": time.monotonic() - self._began,
                "scores": last[0].scores if last else {},
                "best_scores": best.scores if best else {},
                "weights": uri,
            }
            self._say("result", result)

    def _tensorboard(self) -> TensorBoardLog:
        if self._board is None:
            self._board = TensorBoardLog(self._output, purge_step=self._purge_step)
        return self._board

    def _write_records(self) -> None:
        self._drawn_at = time.monotonic()
        storage.write_bytes(storage.join(self._output, "metrics.jsonl"), self.history.to_json_lines())
        storage.write_bytes(storage.join(self._output, "curves.png"), curves({self._output: self.history}))
        self._tensorboard().flush()

    def _warn(self) -> None:
        """Each kind of warning once."""
        for text in warnings_of(self.history):
            kind = " ".join(text.split(" ")[:4])
            if kind not in self._warned:
                self._warned.add(kind)
                self._line(f"warning: {text}")

    def _line(self, text: str) -> None:
        if self._say is not None:
            self._say("line", text)


def main_score(record: EvaluationRecord) -> float:
    """What evaluations are ranked by: AP of keypoints, else of masks, else of boxes."""
    for name in ("keypoints AP", "segm AP", "bbox AP"):
        if name in record.scores:
            return record.scores[name]
    return 0.0

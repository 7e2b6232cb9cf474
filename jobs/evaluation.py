"""What ``maskline evaluate`` has found: as JSON, as notes to the reader, as tables, as files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.coco_defects import Defects
from pipeline.coco_evaluation import Kind, Score
from pipeline.precision_recall import draw_precision_recall

SCORE_THRESHOLD = 0.05
"""The papers' own for COCO's numbers: below it detections are too many and change AP too little."""

NAMED = 5
"""Images that a note or the JSON names."""

CATEGORY_LINES = 30


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came of it."""

    scores: dict[Kind, Score]
    num_images: int
    """That the annotations have, all of them scored."""
    num_annotations: int
    num_detections: int
    """Of those images, in the annotations' categories."""
    images_missing: list[str] = field(default_factory=list)
    """File names without a row in the table: images without detections."""
    images_failed: list[str] = field(default_factory=list)
    """File names whose row says failed: images without detections."""
    failed_by_reason: dict[str, int] = field(default_factory=dict)
    images_resized: list[str] = field(default_factory=list)
    """File names whose image does not measure what the annotations say."""
    num_unknown_images: int = 0
    """Rows of images that the annotations lack: not scored."""
    num_unknown_instances: int = 0
    """Instances in categories that the annotations lack: not scored."""
    categories_missing: list[str] = field(default_factory=list)
    """Annotated categories that the network lacks: their AP is 0."""
    defects: Defects = field(default_factory=Defects)
    """Of the annotation file: what was left out."""
    unscored: dict[Kind, str] = field(default_factory=dict)
    """Kinds that the table has and the annotations lack, and what was said when they were read."""
    score_threshold: float = 0.0
    """The highest that the scored rows were made with."""

    def to_json(self) -> dict[str, Any]:
        """As evaluation.json has it; null where there is no ground truth."""
        numbers: dict[str, Any] = {kind: _nulled(found.stats) for kind, found in self.scores.items()}
        numbers["per_category"] = {kind: _nulled(found.per_category) for kind, found in self.scores.items()}
        return numbers | {
            "images": self.num_images,
            "images_missing": len(self.images_missing),
            "images_failed": len(self.images_failed),
            "images_resized": len(self.images_resized),
            "images_unknown": self.num_unknown_images,
            "annotations": self.num_annotations,
            "detections": self.num_detections,
            "detections_unknown": self.num_unknown_instances,
            "failed_by_reason": self.failed_by_reason,
            "first_missing": self.images_missing[:NAMED],
            "first_failed": self.images_failed[:NAMED],
            "first_resized": self.images_resized[:NAMED],
            "categories_missing": self.categories_missing,
            "defects": self.defects.to_json(),
            "unscored": self.unscored,
            "score_threshold": self.score_threshold,
        }

    def notes(self) -> list[str]:
        """What a reader of the numbers has to know."""
        counted = "they count as images without detections"
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.failed_by_reason.items()))
        notes = {
            "\n  ".join([f"{len(self.defects)} entries of the annotations are left out", *self.defects.lines()]): (
                len(self.defects) > 0
            ),
            f"{_named(self.images_missing)} have no row in the table; {counted}": bool(self.images_missing),
            f"{_named(self.images_failed)} failed ({reasons}); {counted}": bool(self.images_failed),
            f"{_named(self.images_resized)} do not measure what the annotations say": bool(self.images_resized),
            f"{self.num_unknown_images} rows are of images that the annotations lack": self.num_unknown_images > 0,
            f"{self.num_unknown_instances} detections are of categories that the annotations lack": (
                self.num_unknown_instances > 0
            ),
            f"the network lacks annotated categories: {', '.join(self.categories_missing)}": bool(
                self.categories_missing
            ),
            f"the table was made with score_threshold {self.score_threshold:g}; with {SCORE_THRESHOLD} AP is higher": (
                self.score_threshold > SCORE_THRESHOLD
            ),
        }
        unscored = [f"{kind} is not scored: {reason}" for kind, reason in self.unscored.items()]
        return unscored + [note for note, holds in notes.items() if holds]


def _nulled(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def _named(names: list[str]) -> str:
    more = ", …" if len(names) > NAMED else ""
    return f"{len(names)} images ({', '.join(names[:NAMED])}{more})"


def _shown(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.3f}"


def stats_table(scores: dict[Kind, Score]) -> Table:
    """A line for each number, a column for each kind."""
    table = Table("")
    for kind in scores:
        table.add_column(kind, justify="right")
    names = dict.fromkeys(name for found in scores.values() for name in found.stats)
    for name in names:
        values = (found.stats.get(name) for found in scores.values())
        table.add_row(name, *("" if value is None else _shown(value) for value in values))
    return table


def categories_table(scores: dict[Kind, Score]) -> Table:
    """AP of each category, by name; the objects are those that boxes are scored with."""
    table = Table("category")
    for column in ("objects", *(f"AP {kind}" for kind in scores)):
        table.add_column(column, justify="right")
    names = sorted(scores["bbox"].per_category)
    for name in names[:CATEGORY_LINES]:
        values = (_shown(found.per_category[name]) for found in scores.values())
        table.add_row(Text(name), f"{scores['bbox'].num_objects[name]:,}", *values)  # Text: rich would read [a]
    if len(names) > CATEGORY_LINES:
        table.caption = f"… {len(names) - CATEGORY_LINES} more, see --json"
    return table


def write_evaluation(evaluation: Evaluation, output: str) -> None:
    """evaluation.json and a picture for each kind."""
    document = json.dumps(evaluation.to_json(), indent=1).encode()
    storage.write_bytes(storage.join(output, "evaluation.json"), document)
    for kind, found in evaluation.scores.items():
        storage.write_bytes(storage.join(output, f"precision_recall_{kind}.png"), draw_precision_recall(found))

"""maskline evaluate: a results table, or what weights find in images, scored against COCO annotations.

Weights are scored by the table that ``maskline segment`` makes with them, so that both ways give the same numbers.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.command import run
from jobs.segment import SegmentConfig, parse_actors, segment
from pipeline import storage
from pipeline.archive import ARCHIVE_NAMES
from pipeline.coco import CocoDataset, Wanted, read_coco
from pipeline.coco_defects import Defects
from pipeline.coco_evaluation import Kind, Score, score
from pipeline.errors import ConfigError
from pipeline.precision_recall import draw_precision_recall
from pipeline.results import open_results
from pipeline.table_results import TableResults, read_table

SCORE_THRESHOLD = 0.05
"""The papers' own for COCO's numbers: below it detections are too many and change AP too little."""

IMAGES_PER_SHARD = 64
"""Annotated sets are small: shards are too, so that every actor has its share."""

NAMED = 5
"""Images that a note or the JSON names."""

CATEGORY_LINES = 30


Place = Annotated[str | None, tyro.conf.arg(metavar="URI")]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a results table, or weights on images, against COCO annotations."""

    annotations: str
    """A COCO JSON file or its URI."""
    results: Place = None
    """The root of a results table to score."""
    images: Place = None
    """The folder or prefix below which the annotations' file names lie, to run --weights on."""
    weights: Place = None
    """A weights file or its URI, or a name: demo, nuclei or coco; with --images."""
    output: Place = None
    """A folder or URI for evaluation.json, the precision-recall pictures and, with --weights, the table results/."""
    score_threshold: float = SCORE_THRESHOLD
    """With --weights: detections below it are not made. A table has its own."""
    image_prefix: Place = None
    """With --results: what stands before the file names in the image keys; by default any folder or archive may."""
    actors: str = SegmentConfig.actors
    """N, MIN:MAX, or auto: one for each GPU (or for each node without GPUs)."""
    device: Literal["auto", "cpu", "cuda"] = SegmentConfig.device
    """Where the model runs; auto takes GPUs where the cluster has any."""
    precision: Literal["auto", "fp32", "bf16"] = SegmentConfig.precision
    """Of the model's trunk and heads. auto is bf16 on cuda, fp32 on a CPU."""
    address: Place = None
    """A Ray cluster's address; by default RAY_ADDRESS, else a local one is started for the run."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""

    def __post_init__(self) -> None:
        if self.results is not None and (self.images is not None or self.weights is not None):
            raise ConfigError("give either --results, to score a table, or --images and --weights, not both")
        if self.results is None and (self.images is None or self.weights is None):
            lacks = " and ".join(f"--{name}" for name in ("images", "weights") if getattr(self, name) is None)
            raise ConfigError(
                "nothing to score: give --results, to score a table, or --images and --weights, to run weights on "
                f"images; {lacks} {'are' if ' ' in lacks else 'is'} missing"
            )
        if self.image_prefix is not None and self.results is None:
            raise ConfigError("image_prefix goes with --results; --images already says where the images lie")
        if not 0 <= self.score_threshold < 1:
            raise ConfigError(f"score_threshold must lie in [0, 1), got {self.score_threshold}")
        parse_actors(self.actors)


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


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Score the table, or make it first.

    Raises:
        ConfigError: the request is wrong, or table and annotations do not belong together.
    """
    dataset = read_coco(config.annotations, wanted=frozenset())
    if config.results is not None:
        return _evaluate_table(config, dataset, _read_table(config.results, dataset, config.image_prefix))
    with tempfile.TemporaryDirectory(prefix="maskline-evaluate-") as folder:
        output = storage.join(config.output or folder, "results")
        _segment_images(config, dataset, output, Path(folder) / "images.txt")
        return _evaluate_table(config, dataset, _read_table(output, dataset, config.images))


def _segment_images(config: EvaluateConfig, dataset: CocoDataset, table: str, manifest: Path) -> None:
    assert config.images is not None
    assert config.weights is not None
    names = dict.fromkeys(_stored_name(image.file_name) for image in dataset.images)  # an archive once
    lines = [storage.public_uri(storage.join(config.images, name)) for name in names]
    manifest.write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")
    segment(
        SegmentConfig(
            inputs=(str(manifest),),
            output=table,
            weights=config.weights,
            score_threshold=config.score_threshold,
            images_per_shard=IMAGES_PER_SHARD,
            actors=config.actors,
            device=config.device,
            precision=config.precision,
            address=config.address,
        )
    ).raise_if_incomplete()


def _stored_name(file_name: str) -> str:
    """The archive that holds a member ``a.tar#member``, else the file itself."""
    container, mark, _ = file_name.partition("#")
    return container if mark and container.lower().endswith(ARCHIVE_NAMES) else file_name


def _read_table(output: str, dataset: CocoDataset, image_prefix: str | None) -> TableResults:
    image_ids = {image.file_name: image.image_id for image in dataset.images}
    table = read_table(open_results(output), image_ids, dataset.categories, image_prefix)
    if not table.image_ids:
        raise ConfigError(
            f"no row of {output} is of an annotated image: the annotations have {next(iter(image_ids))!r} and "
            f"{len(image_ids) - 1} more; check the table, and --image-prefix if it was given"
        )
    return table


def _evaluate_table(config: EvaluateConfig, dataset: CocoDataset, table: TableResults) -> Evaluation:
    file_names = {image.image_id: image.file_name for image in dataset.images}
    annotated, kinds, unscored = _read_annotations(config.annotations, dataset, table)
    coco = annotated.coco()
    return Evaluation(
        scores=score(coco, table.results, kinds),
        unscored=unscored,
        num_images=len(file_names),
        num_annotations=len(coco.dataset["annotations"]),
        num_detections=len(table.results),
        images_missing=[name for index, name in file_names.items() if index not in table.sizes],
        images_failed=[name for index, name in file_names.items() if table.sizes.get(index, ()) is None],
        failed_by_reason=table.failed_by_reason,
        images_resized=[
            image.file_name
            for image in dataset.images
            if table.sizes.get(image.image_id) not in (None, (image.size.height, image.size.width))
        ],
        num_unknown_images=table.num_unknown_images,
        num_unknown_instances=table.num_unknown_instances,
        categories_missing=sorted(set(dataset.categories.values()) - table.categories),
        defects=annotated.defects,
        score_threshold=max((made["score_threshold"] for made in table.settings), default=0.0),
    )


def _read_annotations(
    uri: str, boxes: CocoDataset, table: TableResults
) -> tuple[CocoDataset, list[Kind], dict[Kind, str]]:
    """The annotations with what the table has too, the kinds that both have, and why others are left out."""
    dataset, kinds, unscored = boxes, list[Kind](["bbox"]), dict[Kind, str]()
    wanted: Wanted = frozenset()
    found = {name for result in table.results for name in ("segmentation", "keypoints") if name in result}
    asked: list[tuple[Kind, Wanted, bool]] = [
        ("segm", frozenset({"masks"}), "segmentation" in found or not table.results),
        ("keypoints", frozenset({"keypoints"}), "keypoints" in found),
    ]
    for kind, more, present in asked:
        if not present:
            continue
        try:
            dataset = read_coco(uri, wanted=wanted | more)
        except ConfigError as error:  # boxes were read: what is asked for more is not there
            unscored[kind] = str(error)
        else:
            wanted |= more
            kinds.append(kind)
    return dataset, kinds, unscored


# ------------------------------------------------------------------------------------------------------------ in words


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


def main(config: EvaluateConfig) -> None:
    """The command: score, write, and say it."""
    evaluation = evaluate(config)
    if config.output is not None:
        write_evaluation(evaluation, config.output)
    for note in evaluation.notes():
        print(f"note: {note}", file=sys.stderr)
    if config.json:
        print(json.dumps(evaluation.to_json()))
        return
    print(
        f"{evaluation.num_images} images, {evaluation.num_annotations} annotations, "
        f"{evaluation.num_detections} detections"
    )
    console = Console()
    console.print(stats_table(evaluation.scores))
    console.print(categories_table(evaluation.scores))
    if config.output is not None:
        print(f"evaluation.json and precision-recall pictures → {storage.public_uri(config.output)}")


if __name__ == "__main__":
    run("evaluate", EvaluateConfig, main)

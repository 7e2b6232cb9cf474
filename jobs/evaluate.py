"""maskline evaluate: a results table, or what weights find in images, scored against COCO annotations.

Weights are scored by the table that ``maskline segment`` makes with them, so that both ways give the same numbers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from jobs.command import run
from jobs.evaluation import SCORE_THRESHOLD, Evaluation, categories_table, stats_table, write_evaluation
from jobs.segment import segment
from jobs.segment_config import SegmentConfig, parse_actors
from pipeline import storage
from pipeline.archive import ARCHIVE_NAMES
from pipeline.coco import CocoDataset, Wanted, read_coco
from pipeline.coco_evaluation import Kind, score
from pipeline.errors import ConfigError
from pipeline.results import open_results
from pipeline.table_results import TableResults, read_table

IMAGES_PER_SHARD = 64
"""Annotated sets are small: shards are too, so that every actor has its share."""


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
            report=False,
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

"""maskline export: a results table in the forms that others read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jobs.command import run
from pipeline.coco import read_coco
from pipeline.errors import ConfigError
from pipeline.export import (
    annotated,
    file_metadata,
    images_with_instances,
    named,
    write_coco,
    write_coco_results,
    write_parquet,
)
from pipeline.export_files import write_labelme, write_masks, write_overlays, write_yolo
from pipeline.results import Results, open_results

Format = Literal["coco", "coco-results", "yolo", "labelme", "masks", "overlays", "parquet"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a results table as COCO, YOLO, LabelMe, label maps, overlays or plain Parquet."""

    output: tyro.conf.Positional[str]
    """The results table's root."""
    format: Format
    """coco: a dataset; coco-results: detections, as pycocotools scores them; yolo, labelme: polygons, holes are lost;
    masks: a 16-bit label map for each image; overlays: a picture for each; parquet: committed rows in two files."""
    to: str
    """A file for coco and coco-results, a folder for the others; a URI for each."""
    where: Annotated[str | None, tyro.conf.arg(metavar="CONDITION")] = None
    """Only instances that meet it, in SQL over their columns: score > 0.8 AND category = 'car'. Images stay."""
    annotations: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None
    """COCO annotations whose image ids coco and coco-results are to have; images that they lack are left out."""
    image_prefix: Annotated[str | None, tyro.conf.arg(metavar="PREFIX")] = None
    """What stands before the file names of the annotations in image keys, where names alone are ambiguous."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""

    def __post_init__(self) -> None:
        if self.annotations is not None and self.format not in ("coco", "coco-results"):
            raise ConfigError(f"annotations give image ids, which {self.format} has none of; leave it out")
        if self.image_prefix is not None and self.annotations is None:
            raise ConfigError("image_prefix goes with --annotations")


def export(config: ExportConfig) -> Counter[str]:
    """Write it; how many images and instances there were.

    Raises:
        ConfigError: there is no table, a condition was not accepted, or names do not fit the annotations.
    """
    results = open_results(config.output)
    if config.format == "parquet":
        return write_parquet(results, config.to, where=config.where)
    rows, categories = images_with_instances(results, where=config.where), categories_of(results)
    if config.annotations is None:
        rows = named(rows, results)
    else:
        dataset = read_coco(config.annotations, require_annotations=False)
        rows, categories = annotated(rows, results, dataset, config.image_prefix), dataset.categories
    writers: dict[str, Callable[[], Counter[str]]] = {
        "coco": lambda: write_coco(rows, config.to, categories),
        "coco-results": lambda: write_coco_results(rows, config.to),
        "yolo": lambda: write_yolo(rows, config.to, categories),
        "labelme": lambda: write_labelme(rows, config.to),
        "masks": lambda: write_masks(rows, config.to),
        "overlays": lambda: write_overlays(rows, config.to),
    }
    return writers[config.format]()


def categories_of(results: Results) -> dict[int, str]:
    """Id → name of all classes that the table's networks know.

    Raises:
        ConfigError: two networks give one id to different classes.
    """
    found: dict[int, str] = {}
    for metadata in file_metadata(results):
        for index, name in json.loads(metadata[b"maskline.categories"]).items():
            if found.setdefault(int(index), name) != name:
                raise ConfigError(
                    f"category {index} is {found[int(index)]!r} for some rows of {results.output} and {name!r} for "
                    "others, made with other weights; export a table for each"
                )
    return found


def main(config: ExportConfig) -> None:
    """The command: write, and say how much."""
    counts = export(config)
    if config.json:
        print(json.dumps(dict(counts) | {"to": config.to}))
        return
    print(f"{', '.join(f'{count} {name}' for name, count in counts.items())} → {config.to}")


if __name__ == "__main__":
    run("export", ExportConfig, main)

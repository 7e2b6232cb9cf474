"""maskline demo: a small archive is drawn, segmented and shown, offline and on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.dataset as pds
from PIL import Image
from rich.console import Console
from rich.table import Table

from jobs.command import run
from jobs.segment import segment
from jobs.segment_config import SegmentConfig
from pipeline.errors import DecodeError
from pipeline.originals import read_originals
from pipeline.overlays import contact_sheet, draw_rows
from pipeline.results import Results, open_results
from pipeline.scenes import write_archive

WEIGHTS = "demo"
"""By name: they come with maskline."""

SHOWN_INSTANCES = 12
"""The best of an image that its overlay shows."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw a small archive, segment it, and look at the results."""

    folder: str = "demo"
    """Where archive, results and overlays go. Run it twice and see that the second run has nothing to do."""
    num_images: int = 240
    """Drawn scenes: two thirds loose files, one third in a tar."""
    num_overlays: int = 8
    """Images shown with their masks."""
    seed: int = 0
    """Of the scenes; those that the weights were trained on have other seeds."""


def main(config: DemoConfig) -> None:
    """The command."""
    folder = Path(config.folder)
    archive, output = folder / "archive", folder / "results"
    if not archive.exists():
        write_archive(archive, num_images=config.num_images, seed=config.seed)
    print(f"archive: {archive}, {config.num_images} drawn scenes, loose files and a tar")
    print(f"weights: {WEIGHTS}, trained on scenes like these (make train-demo)")
    print(f"$ maskline segment {archive} --output {output} --weights {WEIGHTS}")
    summary = segment(SegmentConfig(inputs=(str(archive),), output=str(output), weights=WEIGHTS, images_per_shard=60))
    summary.raise_if_incomplete()
    if summary.images_planned:
        print(f"{summary.images_ok} ok, {summary.images_failed} failed, {summary.images_per_second:.1f} images/s")
    results = open_results(str(output))
    _print_categories(results)
    overlays = _write_overlays(results, folder / "overlays", config.num_overlays)
    print(f"overlays: {len(overlays)} images and a sheet of them in {folder / 'overlays'}")
    print(f'next: maskline sql {output} "SELECT category, count(*), avg(score) FROM instances GROUP BY 1"')


def _print_categories(results: Results) -> None:
    rows = results.instances().to_table(columns=["category", "score", "area"])
    found = rows.group_by("category").aggregate([("score", "count"), ("score", "mean"), ("area", "mean")])
    table = Table("category", "instances", "mean score", "mean area (pixels)")
    for row in found.sort_by([("score_count", "descending")]).to_pylist():
        table.add_row(row["category"], str(row["score_count"]), f"{row['score_mean']:.2f}", f"{row['area_mean']:.0f}")
    Console().print(table)


def _write_overlays(results: Results, folder: Path, count: int) -> list[Path]:
    """PNGs of images spread over the archive, and a sheet of them."""
    folder.mkdir(exist_ok=True)
    keys = sorted(results.images().to_table(columns=["image_key"])["image_key"].to_pylist())
    spread = np.linspace(0, len(keys) - 1, min(count, len(keys))).round().astype(int).tolist()
    paths, pictures = [], []
    for index, (key, pixels) in enumerate(read_originals([keys[place] for place in spread]).items()):
        if isinstance(pixels, DecodeError):
            continue
        instances = results.instances().to_table(filter=pds.field("image_key") == key).to_pylist()
        pictures.append(draw_rows(pixels, instances[:SHOWN_INSTANCES]))
        paths.append(folder / f"{index:02d}.png")
        Image.fromarray(pictures[-1]).save(paths[-1])
    Image.fromarray(contact_sheet(pictures, columns=4)).save(folder / "sheet.png")
    return paths


if __name__ == "__main__":
    run("demo", DemoConfig, main)

"""maskline proposals: regions for a Fast R-CNN, which has no RPN, by OpenCV's selective search (Uijlings et al. 2013).

Images enter by any input of ``maskline segment``; a Parquet file with a row for each leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray

from jobs.command import run
from pipeline import decode
from pipeline.archive import list_images
from pipeline.errors import ConfigError, DecodeError
from pipeline.payloads import Payload, read_images

SCHEMA = pa.schema(
    [
        pa.field("image_key", pa.string(), nullable=False),
        pa.field("boxes", pa.list_(pa.float32())),
        pa.field("error", pa.string()),
    ]
)
"""``boxes`` holds x1, y1, x2, y2 of each proposal one after the other, best first; null beside an error."""


@dataclass(frozen=True, kw_only=True)
class ProposalsConfig:
    """Propose regions for a network without an RPN, by selective search."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Folders, prefixes, globs, archives, tables, manifests, as for maskline segment."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The Parquet file to write; it must not exist."""
    max_proposals: Annotated[int, tyro.conf.arg(metavar="N")] = 2_000
    """Kept of each image, the best first."""
    quality: Literal["fast", "full"] = "fast"
    """How many segmentations are merged: selective search's two published settings."""

    def __post_init__(self) -> None:
        if self.max_proposals < 1:
            raise ConfigError(f"max_proposals must be at least 1, got {self.max_proposals}")


def propose(image: NDArray[np.uint8], config: ProposalsConfig) -> NDArray[np.float32]:
    """(P, 4) x1 y1 x2 y2 of a uint8 RGB image (H, W, 3), best first.

    Raises:
        ConfigError: OpenCV with its extra modules is not installed.
    """
    search = _selective_search()
    search.setBaseImage(np.ascontiguousarray(image[..., ::-1]))  # OpenCV's order is BGR
    if config.quality == "fast":
        search.switchToSelectiveSearchFast()
    else:
        search.switchToSelectiveSearchQuality()
    regions = np.asarray(search.process(), dtype=np.float32).reshape(-1, 4)[: config.max_proposals]  # x y w h
    return np.hstack([regions[:, :2], regions[:, :2] + regions[:, 2:]])


def _selective_search() -> Any:
    try:
        from cv2 import ximgproc

        return ximgproc.segmentation.createSelectiveSearchSegmentation()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "selective search needs OpenCV's extra modules, which are not installed; pip install 'maskline[proposals]'"
        ) from error


def _rows(config: ProposalsConfig) -> Iterator[dict[str, Any]]:
    for batch in list_images(config.inputs):
        items = pa.Table.from_batches([batch])
        keys = items.column("image_key").to_pylist()
        for index, payload in read_images(items):
            yield {"image_key": keys[index], **_row(payload, config)}


def _row(payload: Payload, config: ProposalsConfig) -> dict[str, Any]:
    try:
        if isinstance(payload, DecodeError):
            raise payload
        pixels = decode.decode(payload, decode.inspect(payload, decode.DecodeLimits()))
    except DecodeError as error:
        return {"boxes": None, "error": str(error)}
    return {"boxes": propose(pixels, config).ravel(), "error": None}


def write_proposals(config: ProposalsConfig) -> int:
    """Write the table and return how many images it holds.

    Raises:
        ConfigError: the file is there already, an input holds no image, or OpenCV is not installed.
    """
    if config.output.exists():
        raise ConfigError(f"{config.output} exists; give --output another name")
    _selective_search()
    partial = config.output.with_name(f"{config.output.name}.partial")
    count = 0
    with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        for row in _rows(config):
            writer.write_table(pa.Table.from_pylist([row], SCHEMA))
            count += 1
    partial.replace(config.output)
    return count


def main(config: ProposalsConfig) -> None:
    """The command: write, and say where."""
    count = write_proposals(config)
    print(f"{count} images → {config.output}; next: net.predict(images, proposals=[boxes.reshape(-1, 4), ...])")


if __name__ == "__main__":
    run("proposals", ProposalsConfig, main)

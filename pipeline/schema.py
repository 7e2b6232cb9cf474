"""The columns of the results table, said once: files are written by them and README's tables are printed from them."""

from __future__ import annotations

import pyarrow as pa


def _column(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


IMAGES_SCHEMA = pa.schema(
    [
        _column("image_key", pa.string(), "the image's URI without credentials; archive.tar#member; x.parquet#row"),
        _column("source_version", pa.string(), "the object's etag, or size-mtime where there is none"),
        _column("shard_id", pa.string(), "the shard whose commit published this row"),
        _column("run_id", pa.string(), "the run of that commit, sortable by time"),
        _column("status", pa.string(), "ok or failed"),
        _column("reason", pa.string(), "why it failed, one of a fixed list", nullable=True),
        _column("error", pa.string(), "the message behind the reason", nullable=True),
        _column("width", pa.int32(), "pixels, after EXIF orientation", nullable=True),
        _column("height", pa.int32(), "pixels, after EXIF orientation", nullable=True),
        _column("orientation", pa.int8(), "EXIF orientation that was applied, 1 to 8", nullable=True),
        _column("num_instances", pa.int32(), "rows of this image in instances"),
        _column("bytes", pa.int64(), "encoded size", nullable=True),
    ]
)

INSTANCES_SCHEMA = pa.schema(
    [
        _column("image_key", pa.string(), "as in images"),
        _column("instance_index", pa.int32(), "0 is the best score of the image"),
        _column("category_id", pa.int32(), "the weights' own id"),
        _column("category", pa.string(), "its name"),
        _column("score", pa.float32(), "0 to 1"),
        _column("x1", pa.float32(), "left, continuous pixels of the oriented image"),
        _column("y1", pa.float32(), "top"),
        _column("x2", pa.float32(), "right; the width is x2 - x1"),
        _column("y2", pa.float32(), "bottom"),
        _column("area", pa.int64(), "pixels set in the mask"),
        _column("mask_height", pa.int32(), "of the oriented image"),
        _column("mask_width", pa.int32(), "of the oriented image"),
        _column("mask_rle", pa.string(), "COCO's compressed run-length string", nullable=True),
        _column("keypoints", pa.list_(pa.float32()), "x, y, score of each keypoint", nullable=True),
    ]
)

SCHEMAS: dict[str, pa.Schema] = {"images": IMAGES_SCHEMA, "instances": INSTANCES_SCHEMA}

DICTIONARY_COLUMNS = {
    "images": ["shard_id", "run_id", "status", "reason"],
    "instances": ["image_key", "category"],
}
"""Strings that repeat. Keys of images and masks do not, and a dictionary would only make them larger."""


def as_markdown() -> str:
    """README's description of both tables: ``python -m pipeline.schema`` prints it."""
    parts = []
    for name, schema in SCHEMAS.items():
        rows = [
            f"| `{field.name}` | {field.type}{', nullable' * field.nullable} | {field.metadata[b'meaning'].decode()} |"
            for field in schema
        ]
        parts.append("\n".join([f"`{name}`", "", "| column | type | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(as_markdown())  # noqa: T201

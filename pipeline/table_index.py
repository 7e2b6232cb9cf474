"""A results table made ready to be browsed: filters over a million rows answer while a person waits for nothing.

Committed rows enter once, without their masks, into a DuckDB file; pages of images that meet a filter leave. An image
meets what is asked of instances if one of its instances meets all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

import duckdb
import pyarrow.dataset as pds

from pipeline.errors import ConfigError
from pipeline.results import Results

MEMORY_LIMIT = "1GB"
MAX_PAGE = 500

Order = Literal["key", "best", "worst", "most", "fewest"]

ORDERS: dict[Order, str] = {
    "key": "image_key",
    "best": "best_score DESC NULLS LAST, image_key",
    "worst": "best_score NULLS LAST, image_key",
    "most": "num_instances DESC, image_key",
    "fewest": "num_instances, image_key",
}


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which images are wanted; what is left out is not asked."""

    category: str | None = None
    min_score: float | None = None
    max_score: float | None = None
    min_area: int | None = None
    """Pixels of the mask."""
    max_area: int | None = None
    status: str | None = None
    """ok, failed, or a reason."""
    run: str | None = None
    text: str | None = None
    """Somewhere in the key, in any case."""
    order: Order = "key"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")


class TableIndex:
    """One use each, by ``opened_index``. Its methods may be called from several threads."""

    def __init__(self, results: Results, connection: duckdb.DuckDBPyConnection) -> None:
        self.results = results
        self._connection = connection
        self._load()

    def page(self, wanted: Filter, *, start: int = 0, count: int = 60) -> dict[str, Any]:
        """How many images meet the filter, and some of them in its order."""
        if start < 0 or not 1 <= count <= MAX_PAGE:
            raise ConfigError(f"a page starts at 0 or later and holds 1 to {MAX_PAGE}, got {start} and {count}")
        condition, values = _condition(wanted)
        cursor = self._connection.cursor()
        ((total,),) = cursor.execute(f"SELECT count(*) FROM images WHERE {condition}", values).fetchall()
        columns = ("image_key", "status", "reason", "error", "width", "height", "num_instances", "best_score", "run_id")
        rows = cursor.execute(
            f"SELECT {', '.join(columns)} FROM images WHERE {condition}"
            f" ORDER BY {ORDERS[wanted.order]} LIMIT {count} OFFSET {start}",
            values,
        ).fetchall()
        return {"total": total, "images": [dict(zip(columns, row, strict=True)) for row in rows]}

    def choices(self) -> dict[str, list[tuple[str, int]]]:
        """What there is to choose from, with how many images (of categories: instances) each has."""
        queries = {
            "categories": "SELECT category, count(*) FROM found GROUP BY 1 ORDER BY 2 DESC, 1",
            "statuses": "SELECT coalesce(reason, status), count(*) FROM images GROUP BY 1 ORDER BY 2 DESC, 1",
            "runs": "SELECT run_id, count(*) FROM images GROUP BY 1 ORDER BY 1 DESC",
        }
        cursor = self._connection.cursor()
        return {name: cursor.execute(query).fetchall() for name, query in queries.items()}

    def has(self, image_key: str) -> bool:
        """Whether the table has a row of it: no other picture is ever read."""
        return bool(self._shards_of(image_key))

    def instances(self, image_key: str) -> list[dict[str, Any]]:
        """Its rows with their masks, best first, read from the files of its shard."""
        shards = self._shards_of(image_key)
        own = Results(self.results.output, [commit for commit in self.results.commits if commit.shard_id in shards])
        rows = own.instances().to_table(filter=pds.field("image_key") == image_key).to_pylist() if shards else []
        return sorted(rows, key=lambda row: row["instance_index"])

    def _shards_of(self, image_key: str) -> set[str]:
        query = "SELECT shard_id FROM images WHERE image_key = ?"
        return {shard for (shard,) in self._connection.cursor().execute(query, [image_key]).fetchall()}

    def _load(self) -> None:
        self._connection.register("committed_images", self.results.images())
        self._connection.register("committed_instances", self.results.instances())
        self._connection.execute(
            "CREATE TABLE instances AS SELECT image_key, category, score, area FROM committed_instances"
        )
        self._connection.execute(
            "CREATE TABLE images AS SELECT row_number() OVER (ORDER BY image_key) AS number, committed_images.*,"
            " best_score FROM committed_images"
            " LEFT JOIN (SELECT image_key, max(score) AS best_score FROM instances GROUP BY 1) USING (image_key)"
        )
        self._connection.execute(
            "CREATE TABLE found AS SELECT number, category, score, area FROM instances JOIN images USING (image_key)"
        )
        self._connection.execute("DROP TABLE instances")
        self._connection.unregister("committed_images")
        self._connection.unregister("committed_instances")


@contextmanager
def opened_index(results: Results) -> Iterator[TableIndex]:
    """In a folder of its own, which is removed in the end."""
    with (
        TemporaryDirectory(prefix="maskline-view-") as folder,
        duckdb.connect(f"{folder}/index.duckdb", config={"memory_limit": MEMORY_LIMIT}) as connection,
    ):
        yield TableIndex(results, connection)


def _condition(wanted: Filter) -> tuple[str, list[Any]]:
    """SQL over ``images``, and the values of its question marks."""
    of_images: list[tuple[str, Any]] = [
        ("(status = ? OR reason = ?)", wanted.status),
        ("run_id = ?", wanted.run),
        ("contains(lower(image_key), lower(?))", wanted.text),
    ]
    of_instances: list[tuple[str, Any]] = [
        ("category = ?", wanted.category),
        ("score >= ?", wanted.min_score),
        ("score <= ?", wanted.max_score),
        ("area >= ?", wanted.min_area),
        ("area <= ?", wanted.max_area),
    ]
    conditions, values = ["true"], list[Any]()
    for condition, value in of_images:
        if value is not None:
            conditions.append(condition)
            values += [value] * condition.count("?")
    inner = [(condition, value) for condition, value in of_instances if value is not None]
    if inner:
        conditions.append(f"number IN (SELECT number FROM found WHERE {' AND '.join(one for one, _ in inner)})")
        values += [value for _, value in inner]
    return " AND ".join(conditions), values

"""The plan: listing minus committed, cut into shards.

A shard is the unit of work, of retry and of commit. Its id is a hash of what goes in (image keys, source versions, the
commits it supersedes) and of everything that changes what comes out (weights, settings), so that two runs which plan
the same work name it alike and only one of them commits it.

The listing lies in a DuckDB file beside the driver, not in memory; shards are cut from it as they are asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import duckdb
import pyarrow as pa

from pipeline.archive import ITEM_SCHEMA
from pipeline.commits import Commit
from pipeline.errors import ConfigError
from pipeline.results import Results, hash_columns

MEMORY_LIMIT = "1GB"
"""Of DuckDB in the driver; what needs more, a listing of millions, goes to the plan's own folder."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How an archive is cut into shards."""

    images_per_shard: int = 2_000
    """One shard is the unit of retry and of one pair of Parquet files: 10 to 60 s of GPU time."""
    max_images: int | None = None
    """Plan no more than this many images; the rest is left for another run."""
    retry_failed: bool = False
    """Plan images again whose committed row says failed."""

    def __post_init__(self) -> None:
        if self.images_per_shard < 1:
            raise ConfigError(f"images_per_shard must be at least 1, got {self.images_per_shard}")
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError(f"max_images must be at least 1, got {self.max_images}; leave it out for no bound")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One unit of work."""

    shard_id: str
    items: pa.Table
    """ITEM_SCHEMA, in the order of the archive."""
    inputs_hash: str
    """Of the image keys and source versions."""

    @property
    def num_images(self) -> int:
        return int(self.items.num_rows)


class Plan:
    """What is to be done: counts at once, shards as they are asked for. A context: it keeps a folder of its own."""

    def __init__(
        self,
        listing: Iterable[pa.RecordBatch],
        committed: Results,
        *,
        weights_sha256: str,
        settings_hash: str,
        config: ShardConfig,
    ) -> None:
        """Read the whole listing and subtract what the table already holds.

        Args:
            listing: batches of ITEM_SCHEMA. Of equal image keys the last one counts.
            committed: the table so far.
            weights_sha256, settings_hash: rows made by others than these are not counted as done.
        """
        self.config = config
        self._weights_sha256, self._settings_hash = weights_sha256, settings_hash
        self._folder = tempfile.TemporaryDirectory(prefix="maskline-plan-")
        self._database = duckdb.connect(
            str(Path(self._folder.name) / "plan.duckdb"), config={"memory_limit": MEMORY_LIMIT}
        )
        try:
            self._load(listing)
            self._subtract(committed)
        except BaseException:
            self._close()
            raise
        self.images_listed, self.bytes_listed = self._count("listing")
        self.num_images, self.num_bytes = self._count("todo")
        self.images_done = self._one("SELECT count(*) FROM listing WHERE done")
        self.num_shards = -(-self.num_images // config.images_per_shard)
        self.shards_skipped = self._one("SELECT count(DISTINCT committed_shard) FROM listing WHERE done")

    def shards(self) -> Iterator[Shard]:
        """The shards in the order of the archive."""
        columns = ", ".join(f'"{name}"' for name in ITEM_SCHEMA.names)  # offset is a word of SQL
        for start in range(0, self.num_images, self.config.images_per_shard):
            rows = self._arrow(
                f"SELECT {columns}, coalesce(committed_shard, '') AS supersedes FROM todo"
                f" WHERE position >= {start} AND position < {start + self.config.images_per_shard} ORDER BY position"
            )
            yield self._shard(rows.drop_columns(["supersedes"]).cast(ITEM_SCHEMA), rows["supersedes"])

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        """Remove the plan's own folder."""
        self._database.close()
        self._folder.cleanup()

    def _shard(self, items: pa.Table, supersedes: pa.ChunkedArray) -> Shard:
        inputs_hash = hash_columns(items["image_key"], items["source_version"])
        shard_id = hash_columns([inputs_hash, self._weights_sha256, self._settings_hash], supersedes)[:32]
        return Shard(shard_id=shard_id, items=items, inputs_hash=inputs_hash)

    def _load(self, listing: Iterable[pa.RecordBatch]) -> None:
        self._database.register("batch", ITEM_SCHEMA.empty_table())
        self._database.execute("CREATE TABLE raw AS SELECT 0::BIGINT AS sequence, * FROM batch")
        count = 0
        for batch in listing:  # one at a time, so that an error of the listing stays itself
            self._database.register("batch", pa.Table.from_batches([batch]))
            self._database.execute(f"INSERT INTO raw SELECT {count} + row_number() OVER (), * FROM batch")
            count += batch.num_rows

    def _subtract(self, committed: Results) -> None:
        """Commits are numbered in the order of their runs: of several rows of an image that of the highest counts."""
        made_by = pa.table(
            {
                "number": pa.array(range(len(committed.commits)), pa.int32()),
                "shard_id": pa.array([commit.shard_id for commit in committed.commits], pa.string()),
                "same": pa.array([self._is_same(commit) for commit in committed.commits], pa.bool_()),
            }
        )
        self._database.register("made_by", made_by)
        self._database.execute(
            "CREATE TABLE committed (image_key VARCHAR, source_version VARCHAR, number INTEGER, counts BOOLEAN)"
        )
        status = "status = 'ok'" if self.config.retry_failed else "true"
        for images in committed.all_images():
            self._database.register("images", images)
            self._database.execute(
                f"INSERT INTO committed SELECT image_key, source_version, number, same AND {status}"
                " FROM images JOIN made_by USING (shard_id)"
            )
        self._database.execute(
            "CREATE TABLE visible AS SELECT image_key, max(number) AS number, arg_max(counts, number) AS counts,"
            " arg_max(source_version, number) AS source_version FROM committed GROUP BY image_key"
        )
        self._database.execute(
            "CREATE TABLE listing AS SELECT item.*, made_by.shard_id AS committed_shard,"
            " coalesce(visible.counts AND visible.source_version = item.source_version, false) AS done"
            " FROM (SELECT * FROM raw"
            "       QUALIFY row_number() OVER (PARTITION BY image_key ORDER BY sequence DESC) = 1) AS item"
            " LEFT JOIN visible USING (image_key) LEFT JOIN made_by USING (number)"
        )
        limit = "" if self.config.max_images is None else f" LIMIT {self.config.max_images}"
        self._database.execute(
            "CREATE TABLE todo AS SELECT *, row_number() OVER (ORDER BY sequence) - 1 AS position"
            f" FROM listing WHERE NOT done ORDER BY sequence{limit}"
        )

    def _is_same(self, commit: Commit) -> bool:
        return commit.weights_sha256 == self._weights_sha256 and commit.settings_hash == self._settings_hash

    def _count(self, table: str) -> tuple[int, int]:
        query = f"SELECT count(*), coalesce(sum(greatest(bytes, 0)), 0) FROM {table}"
        ((images, num_bytes),) = self._database.execute(query).fetchall()
        return int(images), int(num_bytes)

    def _one(self, query: str) -> int:
        ((value,),) = self._database.execute(query).fetchall()
        return int(value)

    def _arrow(self, query: str) -> pa.Table:
        return self._database.sql(query).to_arrow_table()

"""maskline sql: a query over the committed rows of a results table, by DuckDB."""

from __future__ import annotations

import json
from dataclasses import dataclass

import duckdb
import tyro
from rich.console import Console
from rich.table import Table

from pipeline.errors import ConfigError
from pipeline.results import open_results


@dataclass(frozen=True, kw_only=True)
class SqlConfig:
    """Query a results table: its views are images and instances."""

    output: tyro.conf.Positional[str]
    """The results table's root."""
    query: tyro.conf.Positional[str]
    """For example: SELECT category, count(*) FROM instances GROUP BY 1"""
    json: bool = False
    """Print one JSON object for each row."""


def query(config: SqlConfig) -> duckdb.DuckDBPyRelation:
    """The query's rows.

    Raises:
        ConfigError: there is no table, or DuckDB does not accept the query.
    """
    results = open_results(config.output)
    connection = duckdb.connect()
    connection.register("images", results.images())
    connection.register("instances", results.instances())
    try:
        return connection.sql(config.query)
    except duckdb.Error as error:
        raise ConfigError(f"the query was not accepted: {error}. The views are images and instances") from error


def main(config: SqlConfig) -> None:
    """The command: print the rows."""
    relation = query(config)
    rows = relation.fetchall()
    if config.json:
        for row in rows:
            print(json.dumps(dict(zip(relation.columns, row, strict=True)), default=str))
        return
    table = Table(*relation.columns)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(SqlConfig))

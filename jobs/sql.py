"""maskline sql: a query over the committed rows of a results table, by DuckDB."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import duckdb
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.command import run
from pipeline.errors import ConfigError
from pipeline.report import runs_table
from pipeline.results import open_results


@dataclass(frozen=True, kw_only=True)
class SqlConfig:
    """Query a results table: its views are images, instances and runs."""

    output: tyro.conf.Positional[str]
    """The results table's root."""
    query: tyro.conf.Positional[str]
    """For example: SELECT category, count(*) FROM instances GROUP BY 1"""
    json: bool = False
    """Print one JSON object for each row."""


def query(config: SqlConfig) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The query's columns and rows.

    Raises:
        ConfigError: there is no table, or DuckDB does not accept the query.
    """
    results = open_results(config.output)
    connection = duckdb.connect()
    connection.register("images", results.images())
    connection.register("instances", results.instances())
    connection.register("runs", runs_table(config.output))
    try:
        relation = connection.sql(config.query)
        if relation is None:
            raise ConfigError(
                "the query gives no rows: it should be a SELECT over the views images, instances and runs"
            )
        return relation.columns, relation.fetchall()
    except duckdb.Error as error:
        raise ConfigError(f"the query was not accepted: {error}. The views are images, instances and runs") from error


def main(config: SqlConfig) -> None:
    """The command: print the rows."""
    columns, rows = query(config)
    if config.json:
        for row in rows:
            print(json.dumps(dict(zip(columns, row, strict=True)), default=str))
        return
    table = Table()
    for column in columns:
        table.add_column(Text(column))  # Text, for rich would read [a] in a key as markup
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    Console().print(table)


if __name__ == "__main__":
    run("sql", SqlConfig, main)

"""maskline report: the page of one run, made again from the results table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.command import run
from pipeline.errors import ConfigError
from pipeline.report import run_ids, write_report
from pipeline.results import open_results


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make the report of a run again: counts, speed, drift, samples, as one page that works offline."""

    output: tyro.conf.Positional[str]
    """The results table's root."""
    run_id: Annotated[str | None, tyro.conf.arg(name="run", metavar="RUN")] = None
    """By default the latest."""
    price_per_hour: Annotated[float | None, tyro.conf.arg(metavar="PRICE")] = None
    """Of one actor with its accelerator; the page then has the price of a million images."""

    def __post_init__(self) -> None:
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < float("inf"):
            raise ConfigError(f"price_per_hour must be at least 0, got {self.price_per_hour}")


def main(config: ReportConfig) -> None:
    """The command: write the page, and say where."""
    results = open_results(config.output)
    run_id = config.run_id
    if run_id is None:
        known = run_ids(config.output)
        if not known:
            raise ConfigError(f"{config.output} has no record of a run yet: maskline segment leaves one at its end")
        run_id = known[-1]
    print(write_report(results, run_id, price_per_hour=config.price_per_hour))


if __name__ == "__main__":
    run("report", ReportConfig, main)

"""The report of a run: one page that says what happened, for people who look at breakfast.

``_runs/<run>.json`` and the run's committed rows enter, ``_runs/<run>.html`` leaves: self-contained, without scripts,
everything in it escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
from numpy.typing import NDArray

from pipeline import storage
from pipeline.drift import Drift, compare
from pipeline.errors import ConfigError, DecodeError
from pipeline.originals import read_originals
from pipeline.overlays import as_jpeg, draw_rows
from pipeline.results import Results
from pipeline.run_statistics import SCORE_BINS, RunStatistics, Sample, number_bin, read_statistics
from pipeline.summary import Summary
from pipeline.uris import is_local

PICTURE_SIDE = 480
"""Pixels of the longer side of a sample."""
SHOWN_INSTANCES = 40
"""The best of an image that its overlay shows."""
SHOWN_CATEGORIES = 12
BUSY = 0.8
"""A model that computes so much of the time is what bounds the run."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One column of a chart."""

    label: str
    value: float
    height: float
    """Percent of the highest."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample as the page has it."""

    sample: Sample
    link: str
    picture: str | None
    """A data URI."""
    problem: str | None


def write_report(results: Results, run_id: str, *, price_per_hour: float | None = None) -> str:
    """Make ``_runs/<run>.html`` from what the table holds; its URI.

    Raises:
        ConfigError: the table has no record of such a run.
    """
    summary = read_summary(results.output, run_id)
    page = render(results, summary, price_per_hour=price_per_hour)
    uri = storage.join(results.output, "_runs", f"{run_id}.html")
    storage.write_bytes(uri, page.encode())
    return uri


def read_summary(output: str, run_id: str) -> dict[str, Any]:
    """What ``_runs/<run>.json`` holds."""
    uri = storage.join(output, "_runs", f"{run_id}.json")
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{output} has no record of a run {run_id}; its runs are {', '.join(run_ids(output)) or 'none yet'}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{uri} is damaged: {error}") from error
    return (
        asdict(Summary(run_id=run_id, output=output, images_listed=0, images_already_done=0, images_planned=0)) | found
    )


def run_ids(output: str) -> list[str]:
    """The runs that left a record, in the order of time."""
    names = (file.uri.rpartition("/")[2] for file in storage.list_files(storage.join(output, "_runs")))
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def runs_table(output: str) -> pa.Table:
    """A row for each run that left a record: the fields of ``Summary``, what is not one value as JSON."""
    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    schema = pa.schema([(field.name, kinds.get(str(field.type), pa.string())) for field in fields(Summary)])
    rows = [read_summary(output, run_id) for run_id in run_ids(output)]
    return pa.Table.from_pylist(
        [
            {name: json.dumps(row[name]) if isinstance(row[name], dict) else row[name] for name in schema.names}
            for row in rows
        ],
        schema=schema,
    )


def render(results: Results, summary: Mapping[str, Any], *, price_per_hour: float | None = None) -> str:
    """The page."""
    run_id = summary["run_id"]
    statistics = read_statistics(results, run_id)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "link": link_of, "percent": _percent, "duration": _duration}
    return environment.get_template("report.html").render(
        summary=summary,
        statistics=statistics,
        drift=find_drift(results, statistics),
        bound_by=bound_by(summary),
        rate=_rate_bars(summary),
        stages=_stage_shares(summary),
        per_image=_number_bars(statistics),
        scores=_score_bars(statistics),
        shown=_show(results.of_run(run_id), statistics.samples),
        cost=_cost(summary, price_per_hour),
        price_per_hour=price_per_hour,
    )


def find_drift(results: Results, statistics: RunStatistics) -> Drift | None:
    """Beside the run before it that committed something; None if there is none."""
    earlier = sorted({commit.run_id for commit in results.commits if commit.run_id < statistics.run_id})
    if not earlier:
        return None
    before = read_statistics(results, earlier[-1], num_samples=0)
    images = (before.images, statistics.images)
    return compare(before.histograms(), statistics.histograms(), images=images, previous_run=earlier[-1])


def bound_by(summary: Mapping[str, Any]) -> str:
    """What the run waited for, in words, and what would help."""
    busy, stages = summary["model_busy"], summary["stage_seconds"]
    if not stages or not sum(stages.values()):
        return "Nothing was computed."
    if busy >= BUSY:
        return f"The model: it computed {busy:.0%} of the time. More actors make it faster."
    waits = {stage: seconds for stage, seconds in stages.items() if stage != "model"}
    stage = max(waits, key=lambda name: waits[name])
    advice = {
        "fetch": "Reading the archive: more actors, or an archive nearer to them, make it faster.",
        "decode": "Decoding: more CPUs for each actor (--cpus-per-actor) or --shrink-jpegs make it faster.",
        "commit": "Writing the results: larger shards (--images-per-shard) make it faster.",
    }
    return f"{advice[stage]} The model computed {busy:.0%} of the time."


def link_of(image_key: str) -> str:
    """What a browser may make of a key."""
    return f"file://{quote(image_key)}" if is_local(image_key) else quote(image_key, safe=":/#")


# ------------------------------------------------------------------------------------------------------------- charts


def _bars(values: Sequence[tuple[str, float]]) -> list[Bar]:
    highest = max((value for _, value in values), default=0.0) or 1.0
    return [Bar(label=label, value=value, height=round(100 * value / highest, 2)) for label, value in values]


def _rate_bars(summary: Mapping[str, Any]) -> list[Bar]:
    timeline = summary.get("timeline") or {"bin_seconds": 1.0, "images": []}
    width = timeline["bin_seconds"]
    last = summary["run_seconds"] - width * (len(timeline["images"]) - 1)  # the last bin is not over
    seconds = [width] * (len(timeline["images"]) - 1) + [max(min(width, last), 0.1 * width)]
    return _bars(
        [
            (f"{_duration(index * width)}: {images / length:.1f} images/s", images / length)
            for index, (images, length) in enumerate(zip(timeline["images"], seconds, strict=False))
        ]
    )


def _stage_shares(summary: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Stage, its seconds and its share of all."""
    stages = summary["stage_seconds"]
    total = sum(stages.values()) or 1.0
    return [(stage, seconds, seconds / total) for stage, seconds in stages.items()]


def _number_bars(statistics: RunStatistics) -> list[Bar]:
    bins: dict[str, float] = {}
    for number in sorted(statistics.instances_per_image):
        name = number_bin(number)
        bins[name] = bins.get(name, 0) + statistics.instances_per_image[number]
    return _bars(list(bins.items()))


def _score_bars(statistics: RunStatistics) -> list[tuple[str, int, list[Bar]]]:
    """Category, its instances, and their scores."""
    labels = [f"{index / SCORE_BINS:.2f} to {(index + 1) / SCORE_BINS:.2f}" for index in range(SCORE_BINS)]
    return [
        (category, sum(counts), _bars(list(zip(labels, counts, strict=True))))
        for category, counts in list(statistics.scores.items())[:SHOWN_CATEGORIES]
    ]


# ------------------------------------------------------------------------------------------------------------ samples


def _show(results: Results, samples: Sequence[Sample]) -> list[Shown]:
    originals = read_originals([sample.image_key for sample in samples if sample.kind != "failed"])
    shown = []
    for sample in samples:
        original = originals.get(sample.image_key, DecodeError("unreadable", "it was not read"))
        if sample.kind == "failed":
            picture, problem = None, f"{sample.reason}: {sample.error}"
        elif isinstance(original, DecodeError):
            picture, problem = None, str(original)
        else:
            picture, problem = _picture(results, sample, original), None
        shown.append(Shown(sample=sample, link=link_of(sample.image_key), picture=picture, problem=problem))
    return shown


def _picture(results: Results, sample: Sample, pixels: NDArray[np.uint8]) -> str:
    rows = results.instances().to_table(filter=pds.field("image_key") == sample.image_key).to_pylist()
    rows.sort(key=lambda row: row["instance_index"])
    picture = as_jpeg(draw_rows(pixels, rows[:SHOWN_INSTANCES]), side=PICTURE_SIDE)
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


# -------------------------------------------------------------------------------------------------------------- words


def _cost(summary: Mapping[str, Any], price_per_hour: float | None) -> dict[str, float] | None:
    """Hours of one actor, and their price, for a million images."""
    images = summary["images_ok"] + summary["images_failed"]
    if not images or not summary["actors"]:
        return None
    hours = summary["actors"] * summary["run_seconds"] / 3600 / images * 1e6
    return {"hours": hours, "price": hours * (price_per_hour or 0.0)}


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

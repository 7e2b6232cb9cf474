"""What one run put into the table, read from its committed rows: counts, histograms, images worth looking at."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import duckdb

from pipeline.drift import Histogram
from pipeline.results import Results

SCORE_BINS = 20
KEYS_PER_REASON = 20
"""Failed images that are named; the others are counted."""
SAMPLES = 3
"""Of each kind."""
MEMORY_LIMIT = "1GB"
COLUMNS = {
    "images": "image_key, status, reason, error, width, height, num_instances",
    "instances": "image_key, category, score",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image that a person may want to see."""

    kind: str
    """best, middling, crowded, empty or failed."""
    image_key: str
    num_instances: int
    mean_score: float | None
    reason: str | None
    error: str | None


@dataclass(frozen=True, kw_only=True)
class RunStatistics:
    """Of the images that one run committed."""

    run_id: str
    images_ok: int
    images_failed: int
    failed: dict[str, tuple[int, list[tuple[str, str]]]]
    """Reason → how many, and the first keys with their messages."""
    instances_per_image: Counter[int]
    """Of those that are ok."""
    scores: dict[str, list[int]]
    """Category → instances in each of SCORE_BINS from 0 to 1, most frequent category first."""
    megapixels: Counter[int]
    """Images by the binary logarithm of their pixels, rounded down."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def images(self) -> int:
        return self.images_ok + self.images_failed

    @property
    def instances(self) -> int:
        return sum(number * count for number, count in self.instances_per_image.items())

    def histograms(self) -> dict[str, Histogram]:
        """What drift is looked for in."""
        per_image: Counter[str] = Counter()
        for number, count in self.instances_per_image.items():
            per_image[number_bin(number)] += count
        scores = [sum(column) for column in zip(*self.scores.values(), strict=True)] or [0] * SCORE_BINS
        categories = {category: sum(counts) for category, counts in self.scores.items()}
        return {
            "failed images": Histogram(
                counts={"ok": self.images_ok, "failed": self.images_failed},
                typical=f"{self.images_failed / max(1, self.images):.1%}",
            ),
            "instances per image": Histogram(
                counts=per_image, typical=f"{self.instances / max(1, self.images_ok):.2f} on average"
            ),
            "categories": Histogram(counts=categories, typical=_most_frequent(categories)),
            "scores": Histogram(
                counts={str(index): count for index, count in enumerate(scores)}, typical=_median_score(scores)
            ),
            "image sizes": Histogram(
                counts={str(power): count for power, count in self.megapixels.items()},
                typical=_median_size(self.megapixels),
            ),
        }


def number_bin(number: int) -> str:
    """0, 1, 2, 3–4, 5–8, 9–16, …"""
    if number <= 2:
        return str(number)
    low, high = 3, 4
    while number > high:
        low, high = high + 1, 2 * high
    return f"{low}–{high}"


def read_statistics(results: Results, run_id: str, *, num_samples: int = SAMPLES) -> RunStatistics:
    """Of one run of the table, also those of its rows that a later run superseded."""
    with _connection(results.of_run(run_id)) as connection:

        def rows(query: str, **parameters: object) -> list[tuple[Any, ...]]:
            found: list[tuple[Any, ...]] = connection.execute(query, parameters or None).fetchall()
            return found

        by_status = dict(rows("SELECT status, count(*) FROM images GROUP BY 1"))
        scores: dict[str, list[int]] = defaultdict(lambda: [0] * SCORE_BINS)
        for category, index, count in rows(
            f"SELECT category, least(floor(score * {SCORE_BINS}), {SCORE_BINS - 1})::INTEGER, count(*)"
            " FROM instances GROUP BY 1, 2"
        ):
            scores[category][max(0, index)] += count
        return RunStatistics(
            run_id=run_id,
            images_ok=by_status.get("ok", 0),
            images_failed=by_status.get("failed", 0),
            failed=_failed(rows),
            instances_per_image=Counter(
                dict(rows("SELECT num_instances, count(*) FROM images WHERE status = 'ok' GROUP BY 1"))
            ),
            scores=dict(sorted(scores.items(), key=lambda item: (-sum(item[1]), item[0]))),
            megapixels=Counter(
                dict(
                    rows(
                        "SELECT floor(log2(width::BIGINT * height))::INTEGER, count(*)"
                        " FROM images WHERE status = 'ok' GROUP BY 1"
                    )
                )
            ),
            samples=list(_samples(rows, num_samples)),
        )


@contextmanager
def _connection(results: Results) -> Iterator[duckdb.DuckDBPyConnection]:
    """The columns that matter, in tables of a database of its own that may grow beyond memory."""
    with TemporaryDirectory(prefix="maskline-report-") as folder:
        config = {"memory_limit": MEMORY_LIMIT, "temp_directory": folder}
        with duckdb.connect(f"{folder}/run.duckdb", config=config) as connection:
            for name, dataset in {"images": results.images(), "instances": results.instances()}.items():
                connection.register("committed", dataset)
                connection.execute(f"CREATE TABLE {name} AS SELECT {COLUMNS[name]} FROM committed")
                connection.unregister("committed")
            yield connection


def _failed(rows: Any) -> dict[str, tuple[int, list[tuple[str, str]]]]:
    counts = rows("SELECT reason, count(*) FROM images WHERE status = 'failed' GROUP BY 1 ORDER BY 2 DESC, 1")
    found = {}
    for reason, count in counts:
        keys = rows(
            "SELECT image_key, coalesce(error, '') FROM images WHERE status = 'failed' AND reason = $reason"
            f" ORDER BY 1 LIMIT {KEYS_PER_REASON}",
            reason=reason,
        )
        found[reason] = (count, keys)
    return found


def _samples(rows: Any, count: int) -> Iterator[Sample]:
    """Some of each kind, no image twice; which of equals hangs on their keys alone."""
    scored = (
        "SELECT image_key, num_instances, mean_score, NULL AS reason, NULL AS error FROM images"
        " JOIN (SELECT image_key, avg(score) AS mean_score FROM instances GROUP BY 1) USING (image_key)"
    )
    unscored = "SELECT image_key, num_instances, NULL, reason, error FROM images"
    middle = "(SELECT quantile_cont(mean_score, 0.5) FROM scored)"
    kinds = {
        "best": f"WITH scored AS ({scored}) SELECT * FROM scored ORDER BY mean_score DESC, hash(image_key)",
        "middling": f"WITH scored AS ({scored}) SELECT * FROM scored"
        f" ORDER BY abs(mean_score - {middle}), hash(image_key)",
        "crowded": f"WITH scored AS ({scored}) SELECT * FROM scored ORDER BY num_instances DESC, hash(image_key)",
        "empty": f"{unscored} WHERE status = 'ok' AND num_instances = 0 ORDER BY hash(image_key)",
        "failed": f"{unscored} WHERE status = 'failed' ORDER BY hash(image_key)",
    }
    taken: set[str] = set()
    for kind, query in kinds.items():
        fresh = [row for row in rows(f"{query} LIMIT {count * len(kinds)}") if row[0] not in taken][:count]
        taken.update(row[0] for row in fresh)
        for key, num_instances, mean_score, reason, error in fresh:
            yield Sample(
                kind=kind,
                image_key=key,
                num_instances=num_instances,
                mean_score=mean_score,
                reason=reason,
                error=error,
            )


def _most_frequent(categories: dict[str, int]) -> str:
    total = sum(categories.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in list(categories.items())[:3]) or "none"


def _median_score(scores: list[int]) -> str:
    index = _median_bin(dict(enumerate(scores)))
    return "none" if index is None else f"median {(index + 0.5) / SCORE_BINS:.2f}"


def _median_size(megapixels: Counter[int]) -> str:
    power = _median_bin(megapixels)
    return "none" if power is None else f"median about {2 ** (power + 0.5) / 1e6:.2g} megapixels"


def _median_bin(counts: dict[int, int]) -> int | None:
    seen, total = 0, sum(counts.values())
    for index in sorted(counts):
        seen += counts[index]
        if total and 2 * seen >= total:
            return index
    return None

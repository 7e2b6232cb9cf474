"""What a person sees while a run goes on: a live bar on a terminal, a plain line every ten seconds in a log."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from pipeline.schedule import Tick

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0


class ProgressView:
    """Shows ticks of a run; use it as a context."""

    def __init__(self, num_images: int, num_shards: int, *, bar: bool, console: Console | None = None) -> None:
        self._num_images, self._num_shards = num_images, num_shards
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if bar:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.1f} images/s"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[failed]} failed"),
                console=console or Console(stderr=True),
            )
            self._task = self._bar.add_task("starting", total=num_images, rate=0.0, failed=0)

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, tick: Tick) -> None:
        now = time.monotonic()
        rate = tick.images_done / max(now - self._started, 1e-9)
        if self._bar is not None:
            description = "segmenting" if tick.actors_up else f"waiting for {tick.actors_asked} actors"
            self._bar.update(
                self._task, completed=tick.images_done, description=description, rate=rate, failed=tick.images_failed
            )
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = self._num_images - tick.images_done
            eta = f"{left / rate:.0f}s" if rate else "unknown"
            logger.info(
                "images=%d/%d shards=%d/%d images_per_second=%.1f eta=%s failed=%d actors=%d/%d",
                *(tick.images_done, self._num_images, tick.shards_done, self._num_shards, rate, eta),
                *(tick.images_failed, tick.actors_up, tick.actors_asked),
            )

from __future__ import annotations

import random

import pytest

from pipeline.timeline import MAX_BINS, Timeline


def test_a_shard_is_spread_over_the_time_it_took() -> None:
    timeline = Timeline()
    timeline.add(3.5, seconds=2.0, images=8, stages={"model": 1.0})  # from 1.5 to 3.5
    assert timeline.images == [0.0, 2.0, 4.0, 2.0]
    assert timeline.stage_seconds == {"model": [0.0, 0.25, 0.5, 0.25]}
    timeline.add(0.25, seconds=9.0, images=4, stages={})  # it began before the first was handed out by this clock
    assert timeline.images == [4.0, 2.0, 4.0, 2.0]
    timeline.add(2.0, seconds=0.0, images=1, stages={})
    assert timeline.images == [4.0, 2.0, 5.0, 2.0]


def test_bins_widen_and_keep_every_image() -> None:
    timeline, chance = Timeline(), random.Random(0)
    for shard in range(5_000):
        timeline.add(10.0 * shard, seconds=chance.uniform(0, 60), images=100, stages={"model": 2.0, "fetch": 1.0})
    assert timeline.bin_seconds == 256  # 50,000 s in at most 240
    assert 50_000 / 256 <= len(timeline.images) <= MAX_BINS
    assert sum(timeline.images) == pytest.approx(500_000)
    assert sum(timeline.stage_seconds["model"]) == pytest.approx(10_000)
    middle = timeline.images[20:-20]
    assert min(middle) == pytest.approx(2_560, rel=0.1)  # ten images a second
    assert max(middle) == pytest.approx(2_560, rel=0.1)

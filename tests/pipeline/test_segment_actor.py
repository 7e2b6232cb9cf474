from __future__ import annotations

import gc
from pathlib import Path

import model
from pipeline.segment_actor import SegmentActor
from pipeline.shard_attempts import ActorConfig
from tests.pipeline.test_results import METADATA


def test_what_is_loaded_is_not_looked_through_for_garbage(tmp_path: Path) -> None:
    config = ActorConfig(output=str(tmp_path), run_id="r", score_threshold=0.5, metadata=METADATA)
    actor = SegmentActor(lambda: model.load("demo"), config)
    gc.unfreeze()  # what actors of other tests set aside
    assert len(gc.get_objects()) > 100_000
    try:
        actor.ready()
        assert len(gc.get_objects()) < 1_000
    finally:
        gc.unfreeze()

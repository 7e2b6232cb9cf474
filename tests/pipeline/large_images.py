"""``python -m tests.pipeline.large_images KIND COUNT``: what one actor's memory grows to over images of 100 megapixels.

A process of its own: its highest memory, printed as JSON, is the actor's.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import model
from pipeline import commits
from pipeline.decode import DecodeLimits
from pipeline.segment_actor import SegmentActor
from pipeline.shard_attempts import ActorConfig, Attempt
from pipeline.shards import Shard
from tests.pipeline.archives import listed
from tests.pipeline.test_results import METADATA

SIDE = 10_000
KINDS = ("jpeg", "progressive", "png", "float-tiff", "small")


def write_image(path: Path, kind: str, number: int) -> None:
    """Smooth, so that it is quickly written."""
    side = 100 if kind == "small" else SIDE
    ramp = (np.arange(side) * (number + 1) * 255 // side).astype(np.uint8)
    if kind == "float-tiff":
        Image.fromarray(np.broadcast_to(ramp.astype(np.float32), (side, side))).save(
            path, "TIFF", compression="tiff_deflate"
        )
        return
    pixels = np.broadcast_to(ramp[:, None], (side, side, 3))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if kind == "png":
        image.convert("RGBA").save(path, "PNG", compress_level=1)
    else:
        image.save(path, "JPEG", progressive=kind == "progressive")


def main(kind: str, count: str) -> None:
    assert DecodeLimits.max_image_pixels == SIDE * SIDE
    with tempfile.TemporaryDirectory(prefix="maskline-large-") as folder:
        archive, output = Path(folder, "archive"), str(Path(folder, "out"))
        archive.mkdir()
        for number in range(int(count)):
            write_image(archive / f"{number}.img.{'tif' if kind == 'float-tiff' else 'jpg'}", kind, number)
        commits.create_table(output)
        Path("/proc/self/clear_refs").write_text("5")  # what writing took is not the actor's: the peak begins anew
        config = ActorConfig(output=output, run_id="r", score_threshold=0.5, metadata=METADATA)
        actor = SegmentActor(partial(model.load, "demo"), config)
        actor.ready()
        began = time.perf_counter()
        outcome = actor.segment(
            Shard(shard_id="s", items=listed(str(archive)), inputs_hash="i"), Attempt(attempt_id="a", urgency=0)
        )
        seconds = time.perf_counter() - began
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    found = {"kind": kind, "images": outcome.images, "failed": outcome.failed_by_reason, "peak_bytes": peak}
    sys.stdout.write(json.dumps(found | {"seconds": round(seconds, 1)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

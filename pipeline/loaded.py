"""What a process has loaded for good, out of the way of garbage collection."""

from __future__ import annotations

import atexit
import gc


def keep_loaded() -> None:
    """Let collections pass over all objects there are.

    An actor has 420,000 of them, a training worker those of its annotations too: to look through them stops every
    thread for a quarter of a second and more, again and again.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries complain at the end of what was never freed

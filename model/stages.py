"""The stages of inference by name, for who measures how long each takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

Stage = Literal[
    "resize and normalise",
    "body and pyramid",
    "RPN head",
    "proposals",
    "RoIAlign for boxes",
    "box head",
    "detections",
    "RoIAlign for masks",
    "mask head",
    "paste and run lengths",
]

STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order they run."""

AfterStage = Callable[[Stage], None]
"""Is told each stage whose work has been given to the device."""


def nothing(stage: Stage) -> None:
    """For who does not want to know."""

"""What makes an entry of a COCO file unusable, and the count of what was found."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any, Literal

DefectKind = Literal[
    "bad_image",
    "duplicate_image_id",
    "duplicate_file_name",
    "missing_file",
    "bad_category",
    "bad_annotation",
    "duplicate_annotation_id",
    "unknown_image",
    "unknown_category",
    "bad_box",
    "zero_area",
    "outside_image",
    "bad_segmentation",
    "bad_keypoints",
]
"""Of images (the first four), categories and annotations. An entry counts under the first kind found."""

MAX_EXAMPLES = 5
"""Texts kept for each kind."""
NUMBERS = {int, float}
"""The types of JSON's numbers. bool, of which Python makes an int, is not among them."""

_BEYOND = 1e15
"""What is at least this far from zero is no coordinate; the sum of two below it is exact enough to clip."""


class Unusable(ValueError):  # noqa: N818  caught where it is counted, so no error to a user
    """An entry of the file cannot be used."""

    def __init__(self, kind: DefectKind, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return self.reason


@dataclass
class Defects:
    """How many entries could not be used, by kind, with a few of each. ``len`` is the total."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first MAX_EXAMPLES of each kind."""

    def add(self, kind: DefectKind, text: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(text)

    def copy(self) -> Defects:
        return Defects(dict(self.counts), {kind: list(texts) for kind, texts in self.examples.items()})

    def to_json(self) -> dict[str, Any]:
        return {kind: {"count": count, "examples": self.examples[kind]} for kind, count in self.counts.items()}

    def lines(self) -> list[str]:
        """For a terminal: each kind with its count, its examples below."""
        lines = []
        for kind, count in self.counts.items():
            texts = self.examples[kind]
            lines += [f"{kind}: {count:,}", *(f"  {text}" for text in texts)]
            if count > len(texts):
                lines.append(f"  and {count - len(texts):,} more")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __len__(self) -> int:
        return sum(self.counts.values())


def is_id(value: Any) -> bool:
    """Whether a value can name an image, a category or an annotation: an integer of 64 bits. "7" and 7.0 cannot."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_number(value: Any) -> bool:
    """Finite and of a size that arithmetic takes; True, "1" and NaN are none."""
    return type(value) in NUMBERS and -_BEYOND < value < _BEYOND


def shown(value: Any) -> str:
    """A value from the file, short enough for a message."""
    return reprlib.repr(value)

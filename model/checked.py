"""The base of our configuration dataclasses: values checked on construction, written to and read from JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


class Checked:
    """Reading from JSON and checking of values, for frozen dataclasses."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            _check_value(f"{type(self).__name__}.{field.name}", getattr(self, field.name), hints[field.name])
        self.check()

    def check(self) -> None:
        """Raise ValueError where a value is out of its bounds."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The dataclass whose `to_json` gave `values`.

        A field that is not there takes its default, so the default of a field that is added later must be what held
        before. One without a default must be there, and nothing else may be.
        """
        known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
        missing = sorted(name for name in set(known) - set(values) if known[name].default is MISSING)
        unknown = sorted(set(values) - set(known))
        if missing or unknown:
            raise ValueError(
                f"{cls.__name__} fields do not match: missing {missing}, unknown {unknown}; "
                "the file was written by another version of maskline, write it again with this one"
            )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]


def at_least(config: object, bound: float, *names: str) -> None:
    """Raise ValueError for the first of the fields that is below the bound."""
    for name in names:
        if getattr(config, name) < bound:
            raise ValueError(f"{name} must be at least {bound}, got {getattr(config, name)}")


def _check_value(name: str, value: object, hint: Any) -> None:
    """Values come from files too: what the annotation says must hold at run time."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
    elif get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name} must be a tuple, got {value!r}")
        for item in value:
            _check_value(f"an item of {name}", item, get_args(hint)[0])
    else:
        kinds = (int, float) if hint is float else (hint,)
        if not isinstance(value, kinds) or (hint is not bool and isinstance(value, bool)):
            raise ValueError(f"{name} must be {hint.__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")

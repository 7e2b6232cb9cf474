"""Options from a file: TOML with the names of the options, which those on the command line override.

    output = "s3://bucket/results"          # --output s3://bucket/results
    inputs = ["s3://bucket/photos/"]        # what stands without a name
    report = false                          # --no-report
    [optimiser]
    learning-rate = 1e-3                    # --optimiser.learning-rate 1e-3

``--config FILE`` reads it, a path or a URI; ``--preset NAME`` reads one that comes with maskline, before any other;
``--print-config`` prints the options of a command as such a file and ends.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from pipeline import storage
from pipeline.errors import ConfigError

PRESETS = Path(__file__).with_name("presets")
"""A folder for each command that has any."""


def with_file(name: str, config_class: type, arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with those of its ``--preset`` and ``--config`` files before them.

    Raises:
        ConfigError: a file is not there, is not TOML, or has an option that the command has not.
    """
    presets, rest = _split("--preset", "a name: --preset cpu", arguments)
    paths, rest = _split("--config", "a file: --config run.toml", rest)
    paths = [_preset_path(name, preset) for preset in presets] + paths
    unnamed, named = list[str](), list[str]()
    for path in paths:
        values = _read(path)
        _check_names(name, config_class, values, path)
        for option, value in _flat(values):
            if option in positional_names(config_class):
                unnamed = _texts(value)
            else:
                named += _as_arguments(option, value)
    at = next((index for index, one in enumerate(rest) if one.startswith("-")), len(rest))
    return [*(rest[:at] or unnamed), *named, *rest[at:]]


def preset_names(name: str) -> list[str]:
    """Those that a command has."""
    return sorted(file.stem for file in PRESETS.glob(f"{name}/*.toml"))


def _preset_path(name: str, preset: str) -> str:
    known = preset_names(name)
    if preset not in known:
        raise ConfigError(f"maskline {name} has no preset {preset!r}; it has {', '.join(known) or 'none'}")
    return str(PRESETS / name / f"{preset}.toml")


def _split(wanted: str, example: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands behind each ``wanted``, and the other arguments."""
    values, rest = list[str](), list[str]()
    following = iter(arguments)
    for argument in following:
        option, equals, value = argument.partition("=")
        if option != wanted:
            rest.append(argument)
            continue
        values.append(value if equals else next(following, ""))
        if not values[-1]:
            raise ConfigError(f"{wanted} needs {example}")
    return values, rest


def as_toml(config: object) -> str:
    """The options of a command as a file that gives them again; options that are not set are left out."""
    return "".join(_lines(config, ""))


def positional_names(config_class: type) -> set[str]:
    """Options that stand without a name."""
    hints = get_type_hints(config_class, include_extras=True)
    return {name for name, hint in hints.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ())}


def _read(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(storage.read_bytes(path).decode())
    except OSError as error:
        raise ConfigError(f"no configuration at {path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _check_names(name: str, config_class: type, values: Mapping[str, Any], path: str, prefix: str = "") -> None:
    hints = get_type_hints(config_class)
    known = {field.name: hints[field.name] for field in fields(config_class)}
    for key, value in values.items():
        option = key.replace("-", "_")
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {prefix}{close[0].replace('_', '-')}?" if close else ""
            raise ConfigError(f"{path} has {prefix}{key}, which is no option of maskline {name}{hint}")
        inner = known[option]
        if isinstance(value, dict):
            if not is_dataclass(inner):
                raise ConfigError(f"{path} has a table {prefix}{key}, but that is one option of maskline {name}")
            assert isinstance(inner, type)
            _check_names(name, inner, value, path, f"{prefix}{key}.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        option = f"{prefix}{key.replace('-', '_')}"
        if isinstance(value, dict):
            yield from _flat(value, f"{option}.")
        else:
            yield option, value


def _as_arguments(option: str, value: Any) -> list[str]:
    *tables, last = option.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*tables, last if value else f"no-{last}"])]
    return ["--" + ".".join([*tables, last]), *_texts(value)]


def _texts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _lines(config: Any, table: str) -> Iterator[str]:
    inner = []
    for field in fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if is_dataclass(value):
            inner.append((f"{table}{name}", value))
        elif value is not None:
            yield f"{name} = {_value(value)}\n"
    for name, value in inner:
        yield f"\n[{name}]\n"
        yield from _lines(value, f"{name}.")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(_value(one) for one in value)}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)  # TOML knows no surrogates

"""The subcommands, and one of them from its arguments to its exit status.

Exit 0: every planned image has a committed row. 1: some shard has none. 2: the request is wrong; nothing was started.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from jobs import logs
from jobs.config_file import as_toml, preset_names, with_file
from pipeline.errors import ConfigError, PipelineError

Config = TypeVar("Config")

COMMANDS = {
    "segment": ("jobs.segment", "SegmentConfig"),
    "report": ("jobs.report", "ReportConfig"),
    "view": ("jobs.view", "ViewConfig"),
    "export": ("jobs.export", "ExportConfig"),
    "sql": ("jobs.sql", "SqlConfig"),
    "train": ("jobs.train", "TrainConfig"),
    "evaluate": ("jobs.evaluate", "EvaluateConfig"),
    "describe": ("jobs.describe", "DescribeConfig"),
    "proposals": ("jobs.proposals", "ProposalsConfig"),
    "draw": ("jobs.draw", "DrawConfig"),
    "demo": ("jobs.demo", "DemoConfig"),
    "benchmark": ("jobs.benchmark", "BenchmarkConfig"),
    "completion": ("jobs.completion", "CompletionConfig"),
}
"""Name → module and the dataclass its options come from; imported when it is asked for, so that --help is quick."""

ABOUT_FILES = (
    "Options may stand in a TOML file, by their names: --config run.toml; those given here override them. "
    "--print-config prints them as such a file."
)


def run(
    name: str, config_class: type[Config], main: Callable[[Config], None], arguments: Sequence[str] | None = None
) -> None:
    """Parse the options of ``maskline name`` and run it; errors become one line and an exit status."""
    logs.set_up()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        shows_config = "--print-config" in given
        given = with_file(name, config_class, [one for one in given if one != "--print-config"])
        description = f"{config_class.__doc__}\n\n{ABOUT_FILES}{_about_presets(name)}"
        config = tyro.cli(config_class, args=given, prog=f"maskline {name}", description=description)
        if shows_config:
            sys.stdout.write(as_toml(config))
            return
        main(config)
    except ConfigError as error:
        sys.exit(_say(name, str(error), 2))
    except (PipelineError, OSError) as error:
        sys.exit(_say(name, str(error), 1))
    except KeyboardInterrupt:
        sys.exit(_say(name, "stopped; what is committed stays, the same command does the rest", 1))


def _about_presets(name: str) -> str:
    names = preset_names(name)
    return f" --preset {{{','.join(names)}}} takes those of a file that comes with maskline." if names else ""


def _say(name: str, message: str, status: int) -> int:
    print(f"maskline {name}: {message}", file=sys.stderr)
    return status

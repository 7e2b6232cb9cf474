"""maskline completion: a script that makes a shell complete the commands and their options."""

from __future__ import annotations

import importlib
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Annotated, Any, Literal, Union

import tyro

from jobs.command import COMMANDS, run


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a completion script, for a file that the shell reads."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell that is to read it."""


def script(shell: str) -> str:
    """What tyro makes of the options of all commands, files completed where it knows of nothing else."""
    kinds = tuple(
        Annotated[getattr(importlib.import_module(module), config), tyro.conf.subcommand(name)]
        for name, (module, config) in COMMANDS.items()
    )
    any_command: Any = Union[kinds]  # noqa: UP007  there is no operator over a tuple
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            tyro.cli(any_command, prog="maskline", args=["--tyro-print-completion", shell])
    except SystemExit:  # which is how tyro ends
        pass
    return (
        printed.getvalue().replace("complete -F", "complete -o default -F").replace("complete --no-files", "complete")
    )


def main(config: CompletionConfig) -> None:
    """The command: print it."""
    sys.stdout.write(script(config.shell))


if __name__ == "__main__":
    run("completion", CompletionConfig, main)

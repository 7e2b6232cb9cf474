"""The command ``maskline``: a subcommand for each file of this folder."""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib.metadata import version

from jobs.command import COMMANDS, run


def main() -> None:
    """Run one subcommand and end with its exit status."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"maskline {version('maskline')}")
        return
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in COMMANDS:
        _usage(arguments)
    name, *rest = arguments
    module_name, config_name = COMMANDS[name]
    module = importlib.import_module(module_name)
    run(name, getattr(module, config_name), module.main, rest)


def _usage(arguments: list[str]) -> None:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    stream = sys.stdout if asked else sys.stderr
    if arguments and not asked:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"maskline: there is no command {arguments[0]!r}{hint}", file=stream)
    print(
        "usage: maskline {" + ",".join(COMMANDS) + "} …; maskline COMMAND --help for its options; --version",
        file=stream,
    )
    sys.exit(0 if asked else 2)


if __name__ == "__main__":
    main()

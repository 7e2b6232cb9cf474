"""The command ``maskline``: a subcommand for each file of this folder.

Exit 0: every planned image has a committed row. 1: some shard has none. 2: the request is wrong; nothing was started.
"""

from __future__ import annotations

import importlib
import logging
import sys

import tyro

from pipeline.errors import ConfigError, PipelineError

COMMANDS = {
    "segment": ("jobs.segment", "SegmentConfig"),
    "sql": ("jobs.sql", "SqlConfig"),
    "demo": ("jobs.demo", "DemoConfig"),
    "benchmark": ("jobs.benchmark", "BenchmarkConfig"),
}
"""Name → module and the dataclass its options come from; imported when it is asked for, so that --help is quick."""


def main() -> None:
    """Run one subcommand and end with its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("stamina").setLevel(logging.ERROR)  # pipeline/retry.py says once what stamina says each time
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in COMMANDS:
        _usage(arguments)
    name, *rest = arguments
    module_name, config_name = COMMANDS[name]
    module = importlib.import_module(module_name)
    try:
        module.main(tyro.cli(getattr(module, config_name), args=rest, prog=f"maskline {name}"))
    except PipelineError as error:
        print(f"maskline {name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _usage(arguments: list[str]) -> None:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    stream = sys.stdout if asked else sys.stderr
    if arguments and not asked:
        print(f"maskline: there is no command {arguments[0]!r}", file=stream)
    print("usage: maskline {" + ",".join(COMMANDS) + "} …; maskline COMMAND --help for its options", file=stream)
    sys.exit(0 if asked else 2)


if __name__ == "__main__":
    main()

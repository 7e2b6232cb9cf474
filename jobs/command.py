"""One subcommand from its arguments to its exit status.

Exit 0: every planned image has a committed row. 1: some shard has none. 2: the request is wrong; nothing was started.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from pipeline.errors import ConfigError, PipelineError

Config = TypeVar("Config")


def run(
    name: str, config_class: type[Config], main: Callable[[Config], None], arguments: Sequence[str] | None = None
) -> None:
    """Parse the options of ``maskline name`` and run it; errors become one line and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("stamina").setLevel(logging.ERROR)  # pipeline/retry.py says once what stamina says each time
    try:
        main(tyro.cli(config_class, args=arguments, prog=f"maskline {name}"))
    except ConfigError as error:
        sys.exit(_say(name, str(error), 2))
    except (PipelineError, OSError) as error:
        sys.exit(_say(name, str(error), 1))
    except KeyboardInterrupt:
        sys.exit(_say(name, "stopped; what is committed stays, the same command does the rest", 1))


def _say(name: str, message: str, status: int) -> int:
    print(f"maskline {name}: {message}", file=sys.stderr)
    return status

"""``python -m tests.fuzz TARGET SECONDS [FILE…]``: search for input that a target does not stand, or try those files.

Coverage leads the search (atheris, libFuzzer); a target that raises, takes over 20 s or 2 GiB ends it, and the input is
kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["pipeline", "model", "tarfile", "zipfile", "PIL", "csv", "json"]):
    from tests.fuzz.targets import TARGETS


def main(name: str, seconds: str, *files: str) -> None:
    target = TARGETS[name]
    with TemporaryDirectory(prefix="maskline-fuzz-") as corpus:
        for number, seed in enumerate(target.seeds()):
            (Path(corpus) / f"seed-{number:03d}").write_bytes(seed)
        limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=20000", "-seed=1"]
        atheris.Setup([name, *limits, "-verbosity=0", "-print_final_stats=1", *(files or [corpus])], target.read)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Processes that a test started, read from /proc, so that it kills nothing else."""

from __future__ import annotations

import os
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Every process below one, itself left out."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            if fields[0] != "Z":
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def command(pid: int) -> str:
    """The process's command line; Ray's workers write what they run into it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def named(part: str, below: int | None = None) -> list[int]:
    """Descendants whose command line holds ``part``."""
    return [pid for pid in descendants(below or os.getpid()) if part in command(pid)]


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return 1024 * int(fields[0])

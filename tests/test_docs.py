"""The pages of the documentation: their links lead somewhere, and their commands are run.

Blocks: ``console``, whose ``$`` lines are run in the order of the page, in an empty folder; ``python``, run there after
them; ``sh``, which is for clusters and long hours, and of which the options are looked at.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs import command

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if "```console" in page.read_text()]
QUICK = ("archives", "weights")
"""Pages without a run, which every test run has time for."""
GUESTS = ("pandas", "pyspark", "supervision", "fiftyone")
"""Packages that the snippets are about, beyond what maskline installs."""


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if language in languages:
            yield text


def commands(page: Path) -> list[str]:
    """What is typed behind the prompt, continued lines joined."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} leads to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} leads to {link}"


def test_every_page_is_found_from_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name})" not in readme]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_shown_only_have_options_of_ours(page: Path, tmp_path: Path) -> None:
    """Those with a configuration file take the page's own."""
    file = tmp_path / "run.toml"
    file.write_text("".join(blocks(page, "toml")))
    for line in "".join(blocks(page, "sh", "")).replace("\\\n", " ").splitlines():
        name, *arguments = typed(line)
        if name in command.COMMANDS:
            arguments = [str(file) if word.endswith(".toml") else word for word in arguments]
            module, config = command.COMMANDS[name]
            found: list[object] = []
            command.run(name, getattr(importlib.import_module(module), config), found.append, arguments)
            assert found, line


def typed(line: str) -> list[str]:
    """The words behind maskline, whatever it is handed to and wherever its output goes."""
    inner = re.search(r'"[^"]*maskline ([^"]*)"', line) or re.search(r"maskline (.*)", line)
    if inner is None or "…" in line:
        return [""]
    words = shlex.split(inner[1], comments=True)
    return words[: words.index(">>")] if ">>" in words else words or [""]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page.stem in QUICK else pytest.mark.slow, id=page.stem) for page in RUN],
)
def test_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "maskline").write_text(f'#!/bin/sh\nexec {sys.executable} -m jobs "$@"\n')
    (tmp_path / "bin" / "maskline").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    folder = tmp_path / "page"
    folder.mkdir()
    assert commands(page)
    for line in commands(page):
        run = subprocess.run(
            ["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
        )
        assert run.returncode == 0, f"{line}\n{run.stdout}{run.stderr}"
    for snippet in blocks(page, "python"):
        wanted = [name for name in GUESTS if re.search(rf"^\s*(?:import|from) {name}\b", snippet, re.MULTILINE)]
        if all(map(find_spec, wanted)):
            run = subprocess.run(
                [sys.executable, "-c", snippet],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, f"{snippet}\n{run.stderr}"

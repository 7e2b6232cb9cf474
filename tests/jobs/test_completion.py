"""Scripts of completion, in the shells that are here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from jobs.command import COMMANDS
from jobs.completion import script

COMPLETE = """
set -- {words}
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${{#COMP_LINE}}
_tyro_maskline "$1" "${{@: -1}}" "${{@: -2:1}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash_script() -> str:
    return script("bash")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ('maskline ""', {*COMMANDS}),
        ("maskline seg", {"segment"}),
        ("maskline segment --prec", {"--precision"}),
        ('maskline segment --precision ""', {"auto", "fp32", "bf16"}),
        ("maskline export --for", {"--format"}),
    ],
)
def test_bash_completes_commands_options_and_choices(bash_script: str, words: str, expected: set[str]) -> None:
    ran = subprocess.run(
        ["bash", "-c", bash_script + COMPLETE.format(words=words)], capture_output=True, text=True, check=True
    )
    assert expected <= set(ran.stdout.split())
    assert ran.stderr == ""


def test_zsh_and_fish_get_scripts_of_their_own() -> None:
    assert script("zsh").startswith("#compdef maskline")
    assert "complete --command 'maskline'" in script("fish")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_shells_read_their_scripts(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    subprocess.run([shell, "-n"], input=script(shell), text=True, check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize(("typed", "expected"), [("seg", "segment"), ("segment --prec", "--precision")])
def test_fish_completes_commands_and_options(tmp_path: Path, typed: str, expected: str) -> None:
    (tmp_path / "maskline.fish").write_text(script("fish"))
    asked = f"source {tmp_path}/maskline.fish; complete --do-complete 'maskline {typed}'"
    ran = subprocess.run(["fish", "--no-config", "-c", asked], capture_output=True, text=True, check=True)
    assert expected in ran.stdout.split()

"""What `maskline` itself answers, before any of its commands."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from jobs.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "status", "said", "complained"),
    [
        (["--version"], None, f"maskline {version('maskline')}\n", ""),
        (["--help"], 0, "usage: maskline {segment,", ""),
        ([], 2, "", "usage: maskline {segment,"),
        (["segmet"], 2, "", "there is no command 'segmet'; did you mean segment?"),
        (["--versions"], 2, "", "there is no command '--versions'"),
    ],
)
def test_answers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int | None,
    said: str,
    complained: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["maskline", *arguments])
    ended = None
    try:
        main()
    except SystemExit as end:
        ended = end.code
    printed, errors = capsys.readouterr()
    assert ended == status
    assert printed.startswith(said)
    assert bool(printed) is bool(said)
    assert complained in errors
    assert bool(errors) is bool(complained)

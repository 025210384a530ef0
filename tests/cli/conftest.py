"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlo.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mlo_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in an empty folder: exit code, what it printed, what it said on the error stream."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return command

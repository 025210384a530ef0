"""The command `table`, in this process and in others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tables import new_place

from mlo.cli import main

ROOT = Path(__file__).parent.parent.parent

Table = Callable[..., tuple[int, str, str]]
Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Table:
    """Runs `mlo table` in such a folder: exit code, what it printed, what it said on the error stream."""
    monkeypatch.chdir(new_place(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delitem(sys.modules, "six_numbers", raising=False)

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(["table", *arguments, "--import", "six_numbers"])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(exited.value.code or 0), printed.out, printed.err

    return command


@pytest.fixture
def begin() -> Iterator[Begin]:
    """`python -m mlo table …` in a process group of its own, which does not outlive the test."""
    begun: list[subprocess.Popen[str]] = []

    def prepare() -> None:
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "mlo", "table", *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=prepare,
            )
        )
        return begun[-1]

    yield command
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

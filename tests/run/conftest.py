"""The command in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

Begin = Callable[..., subprocess.Popen[str]]


def begin(folder: Path, *arguments: str, before: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    """`python -m mlo …` in `folder`, with Ctrl-C as a terminal would give it; `before` happens in the new process."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        if before is not None:
            before()

    return subprocess.Popen(
        [sys.executable, "-m", "mlo", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


@pytest.fixture(scope="session")
def begin_mlo() -> Iterator[Begin]:
    """`begin`, whose processes do not outlive the tests."""
    begun: list[subprocess.Popen[str]] = []

    def remembered(*arguments, **options) -> subprocess.Popen[str]:
        begun.append(begin(*arguments, **options))
        return begun[-1]

    yield remembered
    for process in begun:
        if process.stdout is not None and not process.stdout.closed:
            process.kill()
            process.communicate()

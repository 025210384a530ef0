"""A table at the end. One thread: see `tests/conftest.py`."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from benchmarks.measure import Row, in_words

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[Row]:
    """Where a case puts its rows."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.write_line(
        f"\n{processor()}, one thread; torch {torch.__version__}, {platform.python_version()}\n"
    )
    terminalreporter.write_line(in_words(rows))


def processor() -> str:
    """The model of the processor, where the system says it."""
    place = Path("/proc/cpuinfo")
    lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())

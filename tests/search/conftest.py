"""The command `search`, in this process and in others, on a problem whose best values are known."""

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

PROBLEM = """
import time, torch, mlo

class Bowl(mlo.Settings):
    x: float = 0.0
    y: int = 0
    rate: float = 1.0
    kind: str = "round"
    tilt: float = 0.0
    wrong: float = -1.0
    pause: float = 0.0

def build(settings: Bowl, context: mlo.Context) -> mlo.Problem:
    def square(values, batch):
        time.sleep(settings.pause)
        bad = settings.x == settings.wrong and context.seed == 1
        return values["point"].square().sum() * (float("nan") if bad else 1)

    def evaluate(values, split, *, model, totals, complete):
        bowl = (settings.x - 0.37) ** 2 + (settings.y - 3) ** 2 + torch.tensor(settings.rate).log10().item() ** 2
        bowl += (settings.kind != "round") + context.seed + settings.tilt * context.seed * settings.x
        found = torch.tensor(bowl if split == "validation" else -bowl, dtype=torch.float64)
        return mlo.Evaluation(metrics={"distance": found, "score": -found, "flat": torch.ones(())})

    return mlo.Problem(
        variables={"point": lambda: torch.ones(2)}, objectives={"square": square}, streams={}, evaluate=evaluate
    )
"""
GRAPH = """
problem: bowl
iterations: 2
threads: 1
levels:
  point: {variables: point, objective: square, optimizer: {sgd: {learning_rate: 0.1}}}
evaluation: {every: 1, select: validation.distance}
"""

Search = Callable[..., tuple[int, str, str]]
Begin = Callable[..., subprocess.Popen[str]]


def place_of(folder: Path) -> Path:
    """A folder with graphs: `bowl`, whose metrics are known in closed form, and those of the tables' tests."""
    new_place(folder)
    (folder / "bowl.py").write_text(PROBLEM)
    (folder / "bowl.yaml").write_text(GRAPH)
    return folder


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Search:
    """Runs `mlo search` in such a folder: exit code, what it printed, what it said on the error stream."""
    monkeypatch.chdir(place_of(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for module in ("bowl", "six_numbers"):
        monkeypatch.delitem(sys.modules, module, raising=False)

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(["search", *arguments, "--import", "bowl", "--import", "six_numbers"])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(exited.value.code or 0), printed.out, printed.err

    return command


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """`python -m mlo search …` in a process group of its own, which does not outlive the test."""
    begun: list[subprocess.Popen[str]] = []

    def command(*arguments: str) -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "mlo", "search", *arguments, "--import", "bowl", "--import", "six_numbers"],
                cwd=place_of(tmp_path),
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=os.setpgrp,
            )
        )
        return begun[-1]

    yield command
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

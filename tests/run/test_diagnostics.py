"""What `metrics.jsonl` says of a method, and the warnings for settings that are known to be meaningless."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mlo
from mlo._run._loop import Loop
from mlo._run._warnings import FIRST_ORDER, warnings

PROBLEM = """
import torch, mlo

def quadratic(values, batch):
    w = values["lower"]
    return 0.5 * (torch.tensor(SPECTRUM) * w * w).sum() - w @ values["upper"]

def distance(values, batch):
    return (values["lower"] - 1).square().sum()

def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:
    objectives = {"quadratic": quadratic, "distance": distance}
    return mlo.Problem(variables={"point": lambda: torch.zeros(2)}, objectives=objectives)
"""
GRAPH = """
problem: warned
iterations: 6
levels:
  lower:
    variables: point
    objective: quadratic
    given: [upper]
    steps: 2
    optimizer: {sgd: {learning_rate: 0.1}}
    hypergradient: {neumann: {terms: 5, step_size: 0.5}}
  upper: {variables: point, objective: distance, subject_to: [lower], optimizer: {sgd: {learning_rate: 0.001}}}
"""
Written = Callable[..., mlo.Spec]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """A lower level whose Hessian is diagonal, in the working directory, loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(method: str, spectrum: tuple[float, float] = (1.0, 0.5)) -> mlo.Spec:
        monkeypatch.delitem(sys.modules, "warned", raising=False)
        (tmp_path / "warned.py").write_text(PROBLEM.replace("SPECTRUM", str(list(spectrum))))
        (tmp_path / "graph.yaml").write_text(GRAPH)
        return mlo.load("graph.yaml", f"levels.lower.hypergradient={method}", imports=["warned"])

    return write


def said(spec: mlo.Spec, folder: str = "run") -> tuple[list[str], Any]:
    """The warnings that a run of `spec` prints, and its summary."""
    console = Console(file=io.StringIO(), width=200)
    run = mlo.run(spec, folder, console=console)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("warning: ")]
    return [line.removeprefix("warning: ") for line in lines], run.summary


@pytest.mark.parametrize(
    ("method", "spectrum", "kind", "message"),
    [
        (
            "{neumann: {terms: 5, step_size: 2.5}}",
            (1.0, 0.5),
            "diverges",
            "step_size · λ_max is 2.5, above 2 (λ_max at least 1): the series diverges; choose step_size: auto, or one "
            "below 1",
        ),
        (
            "{neumann: {terms: 5, step_size: 0.001}}",
            (1.0, 0.5),
            "first_order",
            "far below 1 (λ_max about 0.791 where the cotangent points): the series is first order",
        ),
        (
            "{neumann: {terms: 20, step_size: 0.5}}",
            (1.0, -0.25),
            "negative_curvature",
            "the Hessian is indefinite (curvature -0.25 along a direction it went), and the method needs it positive; the "
            "residual is 7.46",  # 1.125²⁰/√2
        ),
        (
            "{neumann: {terms: 5, step_size: auto}}",
            (0.5, -1.0),
            "negative_curvature",
            "the Hessian is indefinite (curvature -1 along a direction it went)",
        ),
        (
            "{conjugate_gradient: {iterations: 5}}",
            (0.5, -1.0),
            "negative_curvature",
            "the Hessian is indefinite (curvature -0.25 along a direction it went), and the method needs it positive; the "
            "residual is 1; `damping` above its negative curvature helps",
        ),
        (
            "{nystrom: {rank: 2, damping: 0.1}}",
            (0.5, -1.0),
            "negative_curvature",
            "the Hessian is indefinite, and the method needs it positive; `damping`",
        ),
    ],
)
def test_a_setting_that_is_meaningless_is_warned_of_once_with_its_numbers(
    written: Written, method: str, spectrum: tuple[float, float], kind: str, message: str
) -> None:
    lines, summary = said(written(method, spectrum))
    (line,) = lines
    assert line.startswith("iteration 1, pulling 'lower' back for 'upper': ")
    assert message in line
    assert summary["warnings"] == {"lower": {kind: line}}


@pytest.mark.parametrize(
    "method",
    [
        "{neumann: {terms: 5, step_size: 0.5}}",
        "{neumann: {terms: 5, step_size: 1.9}}",
        "{neumann: {terms: 5, step_size: auto}}",
        "{neumann: {terms: 0, step_size: auto}}",
        "{neumann: {terms: 0, step_size: 0.001}}",
        "{neumann: {terms: 50, step_size: 0.5, tolerance: 0.1}}",
        "{conjugate_gradient: {iterations: 5, warm_start: true}}",
        "{nystrom: {rank: 1, damping: 0.1}}",
        "preconditioned",
        "unroll",
    ],
)
def test_a_setting_that_means_something_is_not_warned_of(written: Written, method: str) -> None:
    lines, summary = said(written(method))
    assert lines == []
    assert summary["warnings"] == {}


@pytest.mark.parametrize(
    ("report", "kinds"),
    [
        ({"step_size": 1.0, "terms": 3.0, "lambda_max": 2.0, "residual": 0.9}, []),
        ({"step_size": 1.0, "terms": 3.0, "lambda_max": 2.001, "residual": 1.1}, ["diverges"]),
        ({"step_size": FIRST_ORDER / 4.001, "terms": 3.0, "lambda_max": 1.0, "residual": 0.99}, ["first_order"]),
        ({"step_size": FIRST_ORDER / 3.999, "terms": 3.0, "lambda_max": 1.0, "residual": 0.99}, []),
        ({"step_size": 1.0, "terms": 3.0, "lambda_max": 1.9, "residual": 1.1}, ["grows"]),
        ({"step_size": 1.0, "terms": 3.0, "residual": 1.1, "negative_curvature": 1.0}, ["negative_curvature"]),
        ({"residual": 3.0, "iterations": 2.0, "negative_curvature": 0.0}, []),
        ({"anything": 5.0}, []),
    ],
)  # fmt: skip
def test_the_thresholds(report: dict[str, float], kinds: list[str]) -> None:
    entry = {"reports": {"u": {"w": report}}}
    assert [kind for level, kind, text in warnings(entry, 7) if level == "w" and "iteration 7" in text] == kinds
    assert list(warnings({"losses": {}}, 7)) == []


def test_a_warning_is_not_given_again_by_a_run_that_goes_on(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = written("{neumann: {terms: 20, step_size: 2.5}}", (1.0, -0.25))
    lines, whole = said(spec, "whole")
    assert len(lines) == 1
    iterate = Loop._iterate

    def interrupted(loop: Loop, iteration: int, *rest: object) -> None:
        if iteration == 3:
            raise KeyboardInterrupt
        iterate(loop, iteration, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_iterate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mlo.run(spec, "broken", quiet=True)
    console = Console(file=io.StringIO(), width=200)
    resumed = mlo.resume("broken", console=console)
    assert "warning: " not in console.file.getvalue()
    assert resumed.summary["warnings"] == whole["warnings"]


def test_metrics_hold_the_cosine_and_the_curvature_that_was_measured(written: Written) -> None:
    run = mlo.run(written("{neumann: {terms: 5, step_size: auto}}"), "run", quiet=True)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert "cosine" not in lines[0]["norms"]["upper"]
    for line in lines[1:]:
        assert 0.99 < line["norms"]["upper"]["cosine"] <= 1
    for line in lines:
        report = line["reports"]["upper"]["lower"]
        assert 0.5 <= report["lambda_min"] <= report["lambda_max"] <= 1 + 1e-6
        assert math.isclose(report["step_size"] * report["lambda_max"], 0.8, rel_tol=1e-2)
    assert run.summary["counts"]["products"] == (8 + 5 + 1) + 5 * (1 + 5 + 1)
    assert run.summary["predicted_counts"]["products"] == 6 * (8 + 5 + 1)

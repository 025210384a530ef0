"""What a run says: its progress, what it refuses before the first step, and how it ended."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mlo
from mlo._run._loop import Loop
from mlo._run._progress import Progress
from mlo.cli import main

ROOT = Path(__file__).parent.parent.parent
PROBLEM = """
import random
import numpy as np, torch, mlo

def square(values, batch):
    return (values["lower"] - values["upper"]).square().sum() + CURVATURE * values["lower"].square().sum()

def distance(values, batch):
    return (values["lower"] - 1).square().sum() + sum(float(torch.rand(()) + random.random() + np.random.rand()) for _ in "1")

EVALUATE

def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:
    return mlo.Problem(
        variables={"point": lambda: torch.zeros(3)},
        objectives={"square": square, "distance": distance},
        evaluate=evaluate,
    )
"""
EVALUATE = """
def evaluate(values, split, *, model, totals, complete):
    random.random(), np.random.rand(), torch.rand(1)
    METRICS
"""
NUMBERS = 'return mlo.Evaluation(metrics={"size": values["upper"].sum(), "acc": float("nan")})'
GRAPH = """
problem: remarked
iterations: 8
levels:
  lower:
    variables: point
    objective: square
    given: [upper]
    steps: 3
    optimizer: {sgd: {learning_rate: 0.1}}
    hypergradient: {conjugate_gradient: {iterations: 5}}
  upper: {variables: point, objective: distance, subject_to: [lower], optimizer: {sgd: {learning_rate: 0.1}}}
evaluation: {every: 2}
"""
Written = Callable[..., mlo.Spec]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """A problem and a graph in the working directory, loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(*overrides: str, metrics: str = NUMBERS, evaluate: str = EVALUATE, curvature: float = 0.1) -> mlo.Spec:
        monkeypatch.delitem(sys.modules, "remarked", raising=False)
        text = PROBLEM.replace("EVALUATE", evaluate.replace("METRICS", metrics)).replace("CURVATURE", str(curvature))
        (tmp_path / "remarked.py").write_text(text)
        (tmp_path / "graph.yaml").write_text(GRAPH)
        return mlo.load("graph.yaml", *overrides, imports=["remarked"])

    return write


def said(spec: mlo.Spec, folder: str = "run") -> str:
    """What a run of `spec` prints."""
    console = Console(file=io.StringIO(), width=200)
    mlo.run(spec, folder, console=console)
    return console.file.getvalue()


def test_a_line_of_progress_has_the_last_loss_of_a_level_that_rests() -> None:
    printed = io.StringIO()
    progress = Progress(Console(file=printed, width=200), "graph", 40)
    for iteration in range(1, 41):
        rare = {"rare": float(iteration)} if iteration % 8 == 1 else {}
        progress.update(iteration, {"losses": {"often": 0.0, **rare}, "norms": {}})
    lines = [line for line in printed.getvalue().splitlines() if "rare" in line]
    assert len(lines) == 20
    for line in lines:
        iteration = int(line.split()[1].split("/")[0])
        assert line.endswith(f"rare {(iteration - 1) // 8 * 8 + 1}"), line


@pytest.mark.parametrize(
    ("select", "metrics", "evaluate", "message"),
    [
        ("validation.siz", NUMBERS, EVALUATE, "evaluation.select: no metric named 'validation.siz'. Did you mean 'validation.size'?\n  Known: validation.acc, validation.size."),
        ("test.size", NUMBERS, EVALUATE, "evaluation.select: no metric named 'test.size'."),
        ("validation.size", NUMBERS, "def evaluate(values, split): ...", "evaluation: the problem's evaluate(values, split, *, model, totals, complete) cannot be called so: got an unexpected keyword argument 'model'."),
        ("validation.size", "return {'size': 1.0}", EVALUATE, "evaluation: the problem's evaluate must give an mlo.Evaluation, got a dict."),
        ("validation.size", "pass", EVALUATE, "evaluation: the problem's evaluate must give an mlo.Evaluation, got None."),
        ("validation.size", "return mlo.Evaluation(metrics=[1.0])", EVALUATE, "evaluation: the problem's evaluate must give metrics by name, got a list."),
        ("validation.size", "return mlo.Evaluation(metrics={'size': values['upper']})", EVALUATE, "evaluation: the problem's evaluate must give numbers, and the metric 'size' is a tensor of shape [3]."),
        ("validation.size", "return mlo.Evaluation(metrics={'size': None})", EVALUATE, "evaluation: the problem's evaluate must give numbers, and the metric 'size' is None."),
    ],
)  # fmt: skip
def test_an_evaluation_that_would_end_the_run_is_refused_before_the_first_step(
    written: Written, select: str, metrics: str, evaluate: str, message: str
) -> None:
    spec = written(f"evaluation.select={select}", metrics=metrics, evaluate=evaluate)
    with pytest.raises(mlo.SpecError) as raised:
        mlo.run(spec, "run", quiet=True)
    assert message in str(raised.value)
    assert str(raised.value).startswith(("<override evaluation.select=", "graph.yaml:13:1: "))
    assert not (Path("run") / "metrics.jsonl").exists()


def test_an_evaluation_of_what_is_measured_is_tried_without_a_measurement(written: Written) -> None:
    spec = written(metrics='return mlo.Evaluation(metrics={"seen": 0 if totals else totals["lower"]["seen"]})')
    with pytest.raises(KeyError):  # nothing is ever measured: only the evaluation itself can tell
        mlo.run(spec, "run", quiet=True)
    assert mlo.open_run("run").state("latest").iteration == 1


def test_trying_the_evaluation_changes_no_number(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = mlo.run(written("evaluation.select=validation.size"), "tried", quiet=True)
    monkeypatch.setattr("mlo._run._run.try_evaluation", lambda *_: None)
    plain = mlo.run(written("evaluation.select=validation.size"), "plain", quiet=True)
    for one, other in zip(tried.metrics, plain.metrics, strict=True):
        assert {**one, "seconds": 0, "seconds_of_step": 0} == {**other, "seconds": 0, "seconds_of_step": 0}


def test_a_metric_that_is_never_a_number_selects_nothing_and_is_null_in_json(written: Written) -> None:
    out = said(written("evaluation.select=validation.acc"))
    assert "nothing was selected: validation.acc was never a number; these are the last state's\n" in out
    assert "Selected:" not in out

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for text in [Path("run/summary.json").read_text(), *Path("run/metrics.jsonl").read_text().splitlines()]:
        json.loads(text, parse_constant=refuse)
    summary = mlo.open_run("run").summary
    assert summary["metrics"]["validation.acc"] is None
    assert summary["selected"] == 8
    assert "nothing was selected" not in said(written("evaluation.select=validation.size"), "other")


def test_conjugate_gradients_that_stop_early_say_how_much_less_they_cost(written: Written) -> None:
    out = said(written())
    counts = mlo.open_run("run").summary["counts"]
    assert counts["products"] < 8 * 6
    expected = f"{counts['gradients']} gradients, {counts['products']} products (at most 48 predicted), 8 pullbacks in "
    assert expected in out
    assert "negative curvature" not in out
    assert "(as predicted) in " in said(written("levels.lower.hypergradient=unroll"), "other")


def test_negative_curvature_is_counted_and_the_count_outlives_an_interrupt(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = said(written(curvature=-1.5))
    assert "\nnegative curvature in 8 of 8 pullbacks of 'lower'\n" in out
    assert mlo.open_run("run").summary["negative_curvature"] == {"lower": {"pullbacks": 8, "negative": 8}}
    iterate = Loop._iterate

    def interrupted(loop: Loop, iteration: int, *rest: object) -> None:
        if iteration == 5:
            raise KeyboardInterrupt
        iterate(loop, iteration, *rest)

    monkeypatch.setattr(Loop, "_iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mlo.run(written(curvature=-1.5), "broken", quiet=True)
    monkeypatch.setattr(Loop, "_iterate", iterate)
    resumed = mlo.resume("broken", quiet=True)
    assert resumed.summary["negative_curvature"] == {"lower": {"pullbacks": 8, "negative": 8}}


def test_a_start_run_names_the_folder_it_ends_in_and_what_comes_then(written: Written) -> None:
    written()
    Path("above.yaml").write_text("extends: graph.yaml\nstart: {lower: {graph: graph.yaml, with: {iterations: 2}}}\n")
    out = said(mlo.load("above.yaml", imports=["remarked"]))
    (start,) = (path for path in Path("runs/start").iterdir())
    lines = out.splitlines()
    assert str(start.absolute()) in lines
    assert lines[lines.index(str(start.absolute())) + 1] == "start finished; now above"
    assert f".{start.name}" not in out
    assert "start finished" not in said(mlo.load("above.yaml", imports=["remarked"]), "again")


def test_a_folder_in_use_by_an_unfinished_run_can_be_gone_on_with(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = written()
    with monkeypatch.context() as patched:
        patched.setattr(mlo.Graph, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mlo.run(spec, "run", quiet=True)
    way_on = "choose another with --out, or go on with it: python -m mlo resume run"
    with pytest.raises(mlo.UserError) as raised:
        mlo.run(spec, "run", quiet=True)
    assert str(raised.value) == f"run: a run folder must be new or empty; {way_on}"
    mlo.resume("run", quiet=True)
    with pytest.raises(mlo.UserError, match=r"choose another with --out$"):
        mlo.run(spec, "run", quiet=True)


def test_where_the_first_iteration_fails_nothing_was_trained(written: Written, capsys) -> None:
    written()
    with pytest.raises(SystemExit) as exited:
        main(["run", "penalty", "levels.weights.optimizer.sgd.learning_rate=1e38", "--out", "run", "--quiet"])
    assert exited.value.code == 3
    assert capsys.readouterr().err.splitlines()[-1] == "  Nothing was trained."


def test_measurements_that_change_their_shape_do_not_stop_a_run():
    from mlo._run._standing import _sum

    total = None
    for rows in (4, 4, 2, 4):
        total = _sum(total, torch.ones(rows))
    assert total == 14

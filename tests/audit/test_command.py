"""`mlo audit`: tables, JSON, trained runs, due iterations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

import mlo
from mlo._audit import print_audit
from mlo._audit._table import cells
from mlo.cli import main

SMALL = ("data.train_per_class=2", "data.validation_per_class=2")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return run


def test_a_table_has_every_number_of_its_report_on_a_narrow_screen(capsys):
    found = mlo.audit(mlo.load("penalty", *SMALL, "levels.weights.steps=3"), dense=0, repeats=1)
    print_audit(found, Console(width=60))
    lines = capsys.readouterr().out.splitlines()
    (level,) = found.levels
    told = json.loads(found.to_json())["levels"][0]
    assert {row.method for row in level.rows} >= {"unroll", "first_order", "conjugate_gradient {iterations: 100}"}
    for row, numbers in zip(level.rows, told["rows"], strict=True):
        if row.failure is not None:
            assert any(row.method in line and row.failure in line for line in lines)
            continue
        (line,) = [line for line in lines if line.strip().removeprefix("→").strip().startswith(f"{row.method}  ")]
        shown = list(cells(row).values())
        assert line.split()[-len(shown) :] == shown
        assert line.strip().startswith("→") == numbers["own"]
        for name, text in cells(row).items():
            scale = 2**20 if name == "peak_bytes" else 1
            number = numbers[name]
            assert (text == "–") == (number is None)
            if number is not None:
                assert float(text.replace(",", "")) == pytest.approx(number / scale, rel=0.06, abs=0.06)
    assert level.advice in "\n".join(lines)


def test_json_to_the_screen_and_to_a_file(command, tmp_path):
    arguments = ("audit", "penalty", *SMALL, "--dense", "0", "--methods", "{neumann: {terms: 2, step_size: 1e-3}}")
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["name"], told["state"], told["seed"], told["dtype"]) == ("penalty", "fresh", 0, "float32")
    (level,) = told["levels"]
    assert [row["method"] for row in level["rows"]][:2] == ["unroll", "neumann {terms: 2, step_size: 0.001}"]
    assert "audit: weights below penalty, iteration 1" in err
    code, out, err = command(*arguments, "--out", "table.txt", "--seed", "3")
    assert (code, out) == (0, ""), err
    text = (tmp_path / "table.txt").read_text()
    assert "seed 3" in text
    assert "→ unroll" in text


def test_a_trained_run_is_audited_where_it_stands(command, tmp_path):
    changes = (*SMALL, "iterations=6", "evaluation.every=2", "levels.weights.steps=5", "seed=4")
    run = mlo.run(mlo.load("penalty", *changes), tmp_path / "run", quiet=True)
    graph = (*SMALL, "levels.weights.steps=5", "levels.weights.hypergradient=first_order")
    code, out, err = command("audit", "penalty", *graph, "--at", "run", "--which", "latest", "--dense", "0", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["state"] == "latest of run, after iteration 6"
    assert told["seed"] == 4
    assert "run was run with other iterations, levels" in err
    (level,) = told["levels"]
    assert level["iterations"] == [7]

    state = run.state("latest")  # the five steps and the gradient after them, written out
    data = run.spec.build()[1].streams["train"].draw(None)  # pyright: ignore
    penalty = state.values["penalty"].exp()
    w, moment = dict(state.values["weights"]), dict(next(iter(state.optimizers["weights"].moments.values())))

    def gradient(w):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in w.items()}
        logits = data["images"] @ leaves["weight"].T + leaves["bias"]
        loss = cross_entropy(logits, data["labels"]) + 0.5 * penalty * leaves["weight"].square().sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    start = gradient(w)
    for _ in range(5):
        found = gradient(w)
        moment = {name: 0.9 * moment[name] + found[name] for name in w}
        w = {name: w[name] - 0.1 * moment[name] for name in w}
    for key, right in (("start_gradient_norm", start), ("gradient_norm", gradient(w))):
        norm = sum(part.square().sum() for part in right.values()).sqrt().item()
        assert level[key] == pytest.approx(norm, rel=1e-4), key


def test_what_is_due_next_is_audited_and_draws_are_the_next_ones(command):
    changes = ("levels.penalty.every=4", "levels.penalty.warm_up=2", "levels.weights.steps=2")
    code, out, err = command("audit", "penalty", *SMALL, *changes, "--batches", "2", "--dense", "0", "--json")
    assert code == 0, err
    (level,) = json.loads(out)["levels"]
    assert level["iterations"] == [6, 10]
    row = next(row for row in level["rows"] if row["own"])
    assert row["spread"]["error_unrolled"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "neuman"), "<--methods neuman>: no method named 'neuman'. Did you mean 'neumann'?"),
        (("--methods", "{neumann: {terms: -1, step_size: 1}}"), "neumann.terms: terms must be at least 0, got -1."),
        (("--methods", "{neumann: {terms: 5, step_size: 1e-3"), "not valid YAML"),
        (("--methods", "{neumann: {terms: 5}}"), "'step_size' is missing"),
        (("--at", "nowhere"), "nowhere: not a run folder, spec.yaml is missing"),
        (("--at", "run", "--which", "best"), "'best'"),
        (("--at", "run", "seed=1"), "--at run: it was run with seed 0, which decides its data; leave out seed=1"),
        (("--at", "run", "levels.penalty.variables=null"), "'variables' is missing"),
        (("--batches", "0"), "'--batches'"),
        (("levels.weights.hypergradient=unrol",), "no method named 'unrol'"),
        (("--out", "no/where.txt"), "cannot be written"),
    ],
)
def test_mistakes_are_answered_with_their_place(command, trained, arguments, message):
    code, _, err = command("audit", "penalty", *SMALL, "--dense", "0", *arguments)
    assert code == 2, err
    assert message in err


@pytest.fixture
def trained(tmp_path):
    return mlo.run(mlo.load("penalty", *SMALL, "iterations=1", "evaluation=null"), tmp_path / "run", quiet=True)


def test_a_run_that_does_not_fit_is_refused(command, trained):
    code, _, err = command("audit", "penalty", "levels.weights.optimizer={adam: {learning_rate: 0.1}}", "--at", "run")
    assert code == 2
    assert "does not fit the graph" in err
    assert "it was run with other levels, data or optimizers" in err


def test_a_graph_without_upper_levels_and_a_method_that_is_wrong_come_without_a_traceback(command):
    code, _, err = command("audit", "needs_aware/vanilla")
    assert code == 2
    assert "no level is subject to another" in err


@pytest.mark.slow
def test_needs_aware_is_audited_when_all_its_levels_are_due(command):
    changes = [f"start.{level}.with.iterations=20" for level in ("generator", "discriminator", "meta")]
    code, out, err = command("audit", "needs_aware", *changes, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [(level["upper"], level["level"]) for level in told["levels"]] == [
        ("meta", "refined"),
        ("meta", "generator"),
        ("meta", "classifier"),
    ]
    for level in told["levels"]:
        assert level["iterations"] == [8]
        rows = {row["method"]: row for row in level["rows"]}
        assert rows["finite_difference"]["own"]
        assert rows["unroll {last: 1}"]["cosine_unrolled"] == pytest.approx(1.0)
        assert rows["exact"]["failure"] == f"{level['size']:,} numbers are more than 2,000"
        assert level["spectrum"]["converged"]
        assert any("indefinite" in finding for finding in level["findings"])

"""Graphs that load, and what they load to."""

from __future__ import annotations

import pickle

import pytest

from mlo import optimizer
from mlo.hypergradient import (
    CentralDifference,
    ConjugateGradient,
    FiniteDifference,
    Implicit,
    Neumann,
    Nystrom,
    Preconditioned,
)
from mlo.spec import Choice, Epochs, Frozen, hypergradient_of, load, optimizer_of

GRAPH_WITH = """\
problem: TOY
iterations: 1
levels:
  w: {{variables: a, objective: b, optimizer: {{{}: {{learning_rate: 1}}}}}}
"""


def test_every_field_has_its_value(read):
    spec = read()
    assert (spec.name, spec.problem, spec.seed, spec.iterations) == ("graph", "toy", 0, 10)
    assert (spec.device, spec.dtype, spec.evaluation, spec.checkpoint) == ("cpu", "float32", None, None)
    assert spec.data == {"size": 4}
    weights, penalty = spec.levels["weights"], spec.levels["penalty"]
    assert (weights.name, weights.given, weights.batch, weights.steps) == ("weights", ("penalty",), "train", 1)
    assert weights.variables == Choice(name="linear", options={"width": 3})
    assert penalty.batch == ("validation",)  # a list of one is a mapping to an objective, a name is not
    assert penalty.hypergradient is None
    assert not penalty.frozen


def test_choices_become_values(read):
    weights = read().levels["weights"]
    assert optimizer_of(weights.optimizer) == optimizer.SGD(learning_rate=0.1, momentum=0.5)
    assert hypergradient_of(weights.hypergradient) == FiniteDifference(radius=0.01)
    assert optimizer_of(None) is None
    assert optimizer_of(Choice(name="none")) is None
    assert hypergradient_of(None) is None


@pytest.mark.parametrize(
    ("written", "method"),
    [
        ("{neumann: {terms: 20, step_size: auto}}", Neumann(terms=20, step_size="auto")),
        ("{neumann: {terms: 20, step_size: 1, tolerance: 1e-3}}", Neumann(terms=20, step_size=1.0, tolerance=1e-3)),
        ("{nystrom: {rank: 5, damping: 0.1}}", Nystrom(rank=5, damping=0.1)),
        ("preconditioned", Preconditioned()),
        (
            "{conjugate_gradient: {iterations: 5, warm_start: true}}",
            ConjugateGradient(iterations=5, warm_start=True),
        ),
        (
            "{implicit: {inverse: {nystrom: {rank: 5, damping: 1}}, cross: {central_difference: {radius: 0.1}}}}",
            Implicit(inverse=Nystrom(rank=5, damping=1.0), cross=CentralDifference(radius=0.1)),
        ),
    ],
)
def test_methods_are_written_as_they_are_called(read, graph, written, method):
    spec = read(graph, f"levels.weights.hypergradient={written}")
    assert hypergradient_of(spec.levels["weights"].hypergradient) == method


@pytest.mark.parametrize("name", ["sgd", "SGD", "Sgd", "S_G_D"])
def test_names_ignore_case_and_underscores(read, name):
    spec = read(GRAPH_WITH.format(name))
    assert spec.problem == "toy"
    assert spec.levels["w"].optimizer == Choice(name="sgd", options={"learning_rate": 1})
    assert optimizer_of(spec.levels["w"].optimizer) == optimizer.SGD(learning_rate=1.0)


def test_durations(read):
    spec = read(GRAPH_WITH.format("sgd"), "iterations.epochs=3", "levels.w.warm_up={epochs: 2}", "levels.w.every=4")
    assert spec.iterations == Epochs(epochs=3)
    assert spec.levels["w"].warm_up == Epochs(epochs=2)
    assert spec.levels["w"].every == 4


def test_a_frozen_level_needs_variables_only(read):
    spec = read("problem: toy\niterations: 1\nlevels: {g: {variables: a, optimizer: none}}")
    assert spec.levels["g"].frozen
    assert optimizer_of(spec.levels["g"].optimizer) is None


def test_a_spec_is_frozen_and_hashable_where_it_is_data(read):
    spec = read()
    with pytest.raises(Exception, match="frozen"):
        spec.seed = 3
    with pytest.raises(AttributeError):
        spec.data.other = 3
    with pytest.raises(TypeError):
        spec.data["size"] = 3
    assert hash(Frozen({"a": 1, "b": (2,)})) == hash(Frozen({"b": (2,), "a": 1}))
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_places_are_those_of_the_text(read):
    spec = read()
    assert str(spec.place(("problem",))) == "graph.yaml:1:10"
    assert str(spec.place(("levels", "penalty", "subject_to", 0))) == "graph.yaml:15:18"
    assert str(spec.place(("levels", "weights", "optimizer"))) == "graph.yaml:10:17"
    assert str(spec.place(("levels", "weights", "optimizer", "sgd", "momentum"))) == "graph.yaml:10:53"
    assert str(spec.place(("levels", "weights", "optimizer", "sgd", "momentum"), key=True)) == "graph.yaml:10:43"
    assert str(spec.place(("levels", "weights", "optimizer", "momentum"))) == "graph.yaml:10:53"
    assert str(spec.place(("levels", "weights", "every"))) == "graph.yaml:5:3"  # never written: its level
    assert str(spec.place(("seed",))) == "graph.yaml:1:1"
    assert spec.mistake(("data", "size"), "too small.") == "graph.yaml:3:14: data.size: too small."


def test_later_stages_report_in_the_order_of_the_file(read):
    spec = read()
    spec.fail([])
    with pytest.raises(Exception, match=r"graph.yaml:3:14: data.size: b\n.*graph.yaml:15:17: levels"):
        spec.fail([(("levels", "penalty", "subject_to"), "a"), (("data", "size"), "b")])


def test_a_graph_is_found_without_its_ending(write):
    write(name="deep/er/graph.yaml")
    assert load("deep/er/graph", imports=["toy"]).name == "graph"


def test_shipped_graphs_are_found_by_name(write, tmp_path, monkeypatch):
    write(name="graphs/toys/small.yaml")
    monkeypatch.setattr("mlo.spec._files._PACKAGE", tmp_path / "mlo")
    monkeypatch.chdir(tmp_path / "graphs")
    for name in ("toys/small", "toys/small.yaml"):
        assert load(name, imports=["toy"]).name == "small"
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    spec = load("toys/small", imports=["toy"])
    assert str(spec.place(("problem",))).endswith("graphs/toys/small.yaml:1:10")


def test_a_problem_may_be_named_by_its_import(write):
    text = GRAPH_WITH.format("sgd").replace("TOY", "my.package.toy")
    assert load(write(text), imports=["my.package.toy"]).problem == "toy"


def test_only_a_spec_of_a_graph_takes_overrides(read):
    spec = type(read()).model_validate({"name": "x", "problem": "toy", "iterations": 1, "levels": {}})
    with pytest.raises(Exception, match=r"only a spec that `mlo.load` read"):
        spec.replaced("seed=1")

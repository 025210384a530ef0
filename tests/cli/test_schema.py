"""`mlo schema`: every shipped graph fits it, and wrong ones do not."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mlo.spec import load, shipped_graphs
from mlo.spec._docs import about, summary
from mlo.spec._frozen import thaw
from mlo.spec._levels import LevelSpec
from mlo.spec._nodes import plain
from mlo.spec._registry import candidates
from mlo.spec._schema import schema
from mlo.spec._tables import bare, tables_of
from mlo.spec._yaml import read

ROOT = Path(__file__).parent.parent.parent
GRAPH = """\
problem: penalty
iterations: 10
levels:
  weights:
    variables: linear
    objective: penalised
    given: [penalty]
    batch: train
    optimizer: {sgd: {learning_rate: 0.1, momentum: 0.5}}
    hypergradient: {finite_difference: {radius: 0.01}}
  penalty:
    variables: log_penalty
    objective: classification
    subject_to: weights
    batch: [validation]
    every: {epochs: 2}
    optimizer: {adam: {learning_rate: 1e-3}}
"""
FINITE = "{finite_difference: {radius: 0.01}}"


@cache
def written(problem: str | None = None) -> dict[str, Any]:
    return schema(tables_of(bare(problem)) if problem else None)


def wrong(text: str, problem: str | None = None) -> list[str]:
    """What the schema says of a graph, as an editor that reads YAML 1.2 sees it."""
    found = jsonschema.Draft202012Validator(written(problem)).iter_errors(thaw(plain(read(text, "f", ".")[0])))
    return [error.json_path for error in found]


GRAPHS = shipped_graphs()


@pytest.mark.parametrize("path", GRAPHS.values(), ids=GRAPHS)
def test_every_shipped_graph_fits(path):
    text = path.read_text(encoding="utf-8")
    assert not wrong(text)
    assert not wrong(text, load(path).problem)


@pytest.mark.parametrize("path", GRAPHS.values(), ids=GRAPHS)
def test_every_resolved_graph_fits(path):
    assert not wrong(load(path).to_yaml())


def test_schemas_are_schemas():
    for problem in (None, "penalty", "needs_aware"):
        jsonschema.Draft202012Validator.check_schema(written(problem))


GOOD = [
    ("", ""),
    ("problem: penalty\n", "problem: my_own\n"),
    ("problem: penalty\niterations: 10", "extends: other.yaml"),
    ("10\n", "{epochs: 3}\n"),
    ("10\n", "10\nstart: {weights: a.yaml, penalty: {graph: b.yaml, with: {iterations: 3}}}\n"),
    ("10\n", "10\nevaluation: {model: weights, every: {epochs: 1}, select: validation.accuracy}\n"),
    ("10\n", "10\nevaluation: {pictures_at: 5}\n"),
    ("10\n", "10\nevaluation: {pictures_at: [5, {epochs: 3, of: train}]}\n"),
    ("10\n", "10\ncheckpoint: {every: 3}\ndevice: cuda:1\ndtype: float64\nthreads: 1\ncompile: true\n"),
    ("{sgd: {learning_rate: 0.1, momentum: 0.5}}", "none"),
    ("{adam: {learning_rate: 1e-3}}", "adam"),
    (FINITE, "{unroll: }"),
    (FINITE, "{neumann: {terms: 20, step_size: auto}}"),
    (FINITE, "{neumann: {terms: 20, step_size: 0.1, tolerance: 1e-3, power_iterations: 3}}"),
    (FINITE, "{nystrom: {rank: 5, damping: 0.1}}"),
    (FINITE, "preconditioned"),
    (FINITE, "{conjugate_gradient: {iterations: 5, warm_start: true}}"),
    (FINITE, "{implicit: {inverse: {nystrom: {rank: 5, damping: 0.1}}, cross: {central_difference: {radius: 0.1}}}}"),
    ("1e-3", "{cosine: {start: 0.1, over: 100}}"),
    ("1e-3", "{multi_step: {start: 0.1, at: {epochs: [60, 120]}}}"),
    ("1e-3", "{level: rates}"),
    ("1e-3", "{level: rates, name: learning_rate}"),
    ("0.5", "{level: rates, name: momentum}"),
    ("momentum: 0.5", "groups: {'*.bias': {momentum: {level: rates}}}"),
    ("0.1", "{multi_step: {start: 0.1, at: [60, 120]}}"),
    ("variables: linear", "variables: {linear: {}}"),
    ("    batch: train\n", "    freeze: encoder\n    steps: 3\n    warm_up: {epochs: 1}\n"),
]  # fmt: skip
BAD = [  # what is changed in the graph, and where the schema finds it
    ("problem: penalty\n", "", "$"),
    ("iterations: 10\n", "", "$"),
    ("iterations: 10", "iteration: 10", "$"),
    ("10\n", "0\n", "$.iterations"),
    ("10\n", "often\n", "$.iterations"),
    ("10\n", "1.5\n", "$.iterations"),
    ("10\n", "{epoch: 3}\n", "$.iterations"),
    ("10\n", "10\nseed: -1\n", "$.seed"),
    ("10\n", "10\nname: ''\n", "$.name"),
    ("10\n", "10\nextends: 3\n", "$.extends"),
    ("10\n", "10\ndevice: gpu\n", "$.device"),
    ("10\n", "10\ndtype: float46\n", "$.dtype"),
    ("10\n", "10\nthreads: 0\n", "$.threads"),
    ("10\n", "10\ncompile: inductor\n", "$.compile"),
    ("10\n", "10\ncheckpoint: {}\n", "$.checkpoint"),
    ("10\n", "10\nevaluation: {evry: 3}\n", "$.evaluation"),
    ("10\n", "10\nstart: {weights: 3}\n", "$.start.weights"),
    ("10\n", "10\nstart: {weights: {path: a.yaml}}\n", "$.start.weights"),
    ("  weights:\n", "  Weights:\n", "$.levels"),
    ("    batch: train", "    bacth: train", "$.levels.weights"),
    ("    batch: train", "    batch: 3", "$.levels.weights.batch"),
    ("    batch: train", "    steps: -1", "$.levels.weights.steps"),
    ("    batch: train", "    lookahead: on", "$.levels.weights.lookahead"),
    ("    batch: train", "    name: a", "$.levels.weights"),
    ("    objective: penalised\n", "", "$.levels.weights"),
    ("variables: linear", "variables: [linear]", "$.levels.weights.variables"),
    ("{sgd: {", "{sdg: {", "$.levels.weights.optimizer"),
    ("momentum: 0.5", "momentun: 0.5", "$.levels.weights.optimizer"),
    ("momentum: 0.5", "momentum: fast", "$.levels.weights.optimizer"),
    ("momentum: 0.5", "nesterov: 1", "$.levels.weights.optimizer"),
    ("1e-3", "{cosin: {start: 0.1, over: 100}}", "$.levels.penalty.optimizer"),
    ("1e-3", "{cosine: {start: 0.1, ower: 100}}", "$.levels.penalty.optimizer"),
    ("1e-3", "{name: learning_rate}", "$.levels.penalty.optimizer"),
    ("1e-3", "{level: 3}", "$.levels.penalty.optimizer"),
    ("1e-3", "{level: rates, nam: learning_rate}", "$.levels.penalty.optimizer"),
    ("1e-3", "{read: {level: rates}}", "$.levels.penalty.optimizer"),
    ("learning_rate: 0.1, ", "", "$.levels.weights.optimizer.sgd"),
    ("{sgd: {learning_rate: 0.1, momentum: 0.5}}", "sgd", "$.levels.weights.optimizer"),
    ("finite_difference", "finite_diference", "$.levels.weights.hypergradient"),
    (FINITE, "{neumann: {terms: 20, step_size: atuo}}", "$.levels.weights.hypergradient"),
    (FINITE, "{neumann: {terms: 20, step_size: true}}", "$.levels.weights.hypergradient"),
    (FINITE, "{neumann: {step_size: auto}}", "$.levels.weights.hypergradient.neumann"),
    (FINITE, "{nystrom: {rank: 1.5, damping: 0.1}}", "$.levels.weights.hypergradient"),
    (FINITE, "{nystrom: {rank: 5}}", "$.levels.weights.hypergradient.nystrom"),
    (FINITE, "{preconditioned: {scale: big}}", "$.levels.weights.hypergradient"),
    (FINITE, "{conjugate_gradient: {iterations: 5, warm_start: 1}}", "$.levels.weights.hypergradient"),
    ("subject_to: weights", "subject_to: {weights: }", "$.levels.penalty.subject_to"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), GOOD)
def test_what_is_right_fits(old, new):
    assert GRAPH.count(old) >= 1
    assert not wrong(GRAPH.replace(old, new, 1))


@pytest.mark.parametrize(("old", "new", "place"), BAD)
def test_what_is_wrong_does_not_fit(old, new, place):
    assert GRAPH.count(old) >= 1
    assert place in wrong(GRAPH.replace(old, new, 1))


OF_PROBLEM = [
    ("linear", "liner", "$.levels.weights.variables"),
    ("log_penalty", "{log_penalty: {inital: 1}}", "$.levels.penalty.variables"),
    ("log_penalty", "{log_penalty: {initial: big}}", "$.levels.penalty.variables"),
    ("penalised", "penalized", "$.levels.weights.objective"),
    ("batch: train", "batch: trian", "$.levels.weights.batch"),
    ("[validation]", "[validatoin]", "$.levels.penalty.batch"),
    ("10\n", "10\ndata: {train_per_clas: 3}\n", "$.data"),
    ("10\n", "10\ndata: {train_per_class: 3.5}\n", "$.data.train_per_class"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "place"), OF_PROBLEM)
def test_with_a_problem_its_names_options_and_data_are_known(old, new, place):
    assert not wrong(GRAPH, "penalty")
    assert place in wrong(GRAPH.replace(old, new, 1), "penalty")


def test_numbers_of_objectives_may_be_scheduled():
    text = (ROOT / "graphs" / "needs_aware.yaml").read_text(encoding="utf-8")
    assert text.count("weight: 1.0, need") == 1
    for weight, right in (("{cosine: {start: 1, over: 10}}", True), ("{cosine: {begin: 1}}", False), ("heavy", False)):
        changed = text.replace("weight: 1.0, need", f"weight: {weight}, need")
        assert bool(wrong(changed, "needs_aware")) != right


def test_everything_is_described():
    """Keys, options and names carry what their docstrings say."""
    found = written()
    tables = [found["properties"], *(table["properties"] for table in found["$defs"].values() if "properties" in table)]
    missing = [key for table in tables for key, each in table.items() if not each.get("description")]
    assert not missing
    assert "changed" not in found["properties"]["extends"]["description"]
    for key in ("optimizer", "hypergradient"):
        for name, kind in candidates(key).items():
            assert summary(kind), name
            undocumented = set(kind.__dataclass_fields__) - set(about(kind))
            assert not undocumented, f"{name}: say in its docstring what {undocumented} is"
    options = found["$defs"]["LevelSpec"]["properties"]["optimizer"]["anyOf"]
    assert "momentum" in str(options)
    assert about(LevelSpec)["given"].startswith("levels whose variables")


def test_the_command_prints_it_without_torch(tmp_path):
    program = (
        "import sys\nfrom mlo.cli import main\n"
        "try:\n    main(['schema', '--out', 'mlo.schema.json'])\n"
        "except SystemExit as exited:\n    print(exited.code, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "0 False\n", done.stderr
    assert json.loads((tmp_path / "mlo.schema.json").read_text()) == written()


def test_a_graph_or_a_problem_adds_what_its_problem_knows(mlo_command):
    code, out, err = mlo_command("schema", "--problem", "Penalty")
    assert (code, err) == (0, "")
    assert json.loads(out) == written("penalty")
    code, out, _ = mlo_command("schema", "needs_aware")
    assert code == 0
    assert json.loads(out)["properties"]["data"]["properties"]["imbalance"]["description"].startswith("n_c = max")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--problem", "penalti"), "no problem named 'penalti'. Did you mean 'penalty'?"),
        (("penalty", "--problem", "penalty"), "give GRAPH or --problem, not both"),
        (("--out", "missing/schema.json"), "missing/schema.json: cannot be written"),
    ],
)
def test_a_wrong_request_is_refused(mlo_command, arguments, message):
    code, _, err = mlo_command("schema", *arguments)
    assert code == 2
    assert message in err

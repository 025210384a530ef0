"""What a user gets wrong, through the command line: its message, line and column, exit code 2 and no traceback.

All mistakes of a file are answered in one process that must end without torch; those only a problem knows are answered in
this one.
"""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import mlo
from mlo.spec._files import LARGEST_FILE

ROOT = Path(__file__).parent.parent.parent
GRAPH = """\
problem: penalty
iterations: 10
data: {train_per_class: 4}
levels:
  weights:
    variables: linear
    objective: penalised
    given: [penalty]
    batch: train
    optimizer: {sgd: {learning_rate: 0.1, momentum: 0.5}}
    hypergradient: {finite_difference: {radius: 0.01}}
  penalty:
    variables: {log_penalty: {initial: -3.0}}
    objective: classification
    subject_to: [weights]
    batch: validation
    optimizer: {adam: {learning_rate: 1e-3}}
evaluation: {model: [weights], every: 5}
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)

# What is replaced in the graph, by what, and what is said, from the line and the column on.
CHANGED = [
    ("problem: penalty", "problem: penalti", "1:10: problem: no problem named 'penalti'. Did you mean 'penalty'?"),
    ("problem: penalty\n", "", "1:1: 'problem' is missing: the name of a problem."),
    ("iterations: 10\n", "", "1:1: 'iterations' is missing: a whole number of at least 1, or {epochs: n}."),
    ("iterations: 10", "iteration: 10", "2:1: iteration: unknown key. Did you mean 'iterations'?"),
    ("iterations: 10", "iterations: 10\niterations: 20", "3:1: the key 'iterations' is written twice; the first is in line 2."),
    ("iterations: 10", "iterations: 010", "2:13: 010 is 10 to some readers of YAML and octal to others: write 10 or '010'."),
    ("iterations: 10", "iterations: '10'", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got '10'."),
    ("iterations: 10", "iterations: 1e1", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got 10.0."),
    ("iterations: 10", "iterations: {epochs: 0}", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got {epochs: 0}."),
    ("iterations: 10", "iterations: 1:30", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got '1:30'."),
    ("iterations: 10", "iterations: !!python/object/apply:os.system [ls]", "2:13: the tag !!python/object/apply:os.system is not supported"),
    ("iterations: 10", "iterations: !env N", "2:13: the tag !env is not supported; write the value without it."),
    ("iterations: 10", "iterations: .nan", "2:13: .nan is no number that can be computed with."),
    ("iterations: 10", "iterations: 10\n\tseed: 1", "3:1: not valid YAML: a tab; YAML indents with spaces."),
    ("iterations: 10", "iterations: 10: 3", "2:15: not valid YAML: a second ': ' in one line"),
    ("iterations: 10", "iterations: *ten", "2:13: not valid YAML: found undefined alias 'ten'."),
    ("iterations: 10", "1: 10", "2:1: keys are names, and '1' is not; quote it if it is meant as text."),
    ("iterations: 10", "iterations: 10\nseed: on", "3:7: seed: expected a whole number of at least 0, got 'on'."),
    ("iterations: 10", "iterations: 10\nseed: yes", "3:7: seed: expected a whole number of at least 0, got 'yes'."),
    ("iterations: 10", "iterations: 10\ndtype: float16", "3:8: dtype: expected float32"),
    ("iterations: 10", "iterations: 10\ndevice: tpu", "3:9: device: expected a device, such as cpu, cuda or cuda:1, got 'tpu'."),
    ("iterations: 10", "iterations: 10\nthreads: 0", "3:10: threads: expected a whole number of at least 1, got 0."),
    ("iterations: 10", "iterations: 10\ncompile: 1", "3:10: compile: expected true or false, got 1."),
    ("iterations: 10", "iterations: 10\ncheckpoint: {evry: 3}", "3:14: checkpoint.evry: unknown key. Did you mean 'every'?"),
    ("iterations: 10", "iterations: 10\nextends: gone.yaml", "3:10: extends: no graph 'gone.yaml'."),
    ("iterations: 10", "iterations: 10\nextends: graph.yaml", "3:10: extends: graphs extend each other in a cycle: "),
    ("iterations: 10", "iterations: 10\nextends: /dev/zero", "3:10: extends: no graph '/dev/zero'."),
    ("iterations: 10", "iterations: 10\nextends: /etc/passwd", "3:10: extends: '/etc/passwd' is no graph: a graph's file ends in .yaml or .yml."),
    ("iterations: 10", "iterations: 10\nextends: notes.txt", "3:10: extends: 'notes.txt' is no graph: a graph's file ends in .yaml or .yml."),
    ("iterations: 10", "iterations: 10\nextends: huge.yaml", "huge.yaml: more than 1 MiB: a graph has a few kilobytes."),
    ("iterations: 10", "iterations: 10\nextends: .", "3:10: extends: '.' is a folder, and a graph is a file."),
    ("iterations: 10", f"iterations: 10\nextends: {'x' * 5000}", "3:10: extends: no graph 'xxxx"),
    ("iterations: 10", 'iterations: 10\nextends: "a\\0b"', "3:10: extends: no graph"),
    ("iterations: 10", "iterations: 10\nstart: {weights: gone.yaml}", "3:18: start.weights: no graph 'gone.yaml'."),
    ("iterations: 10", "iterations: 10\nstart: {weights: notes.txt}", "3:18: start.weights: 'notes.txt' is no graph"),
    ("iterations: 10", "iterations: 10\nstart: {weights: graph.yaml}", "3:18: start.weights: graphs start from each other in a cycle"),
    ("iterations: 10", "iterations: 10\nstart: {wheights: other.yaml}", "3:9: start.wheights: no level named 'wheights'. Did you mean 'weights'?"),
    ("{train_per_class: 4}", "{train_per_class: 4, train_per_class: 5}", "3:28: the key 'train_per_class' is written twice"),
    ("{train_per_class: 4}", "&d {<<: *d}", "3:7: an alias stands inside the value it names."),
    ("{train_per_class: 4}", "[4]", "3:7: data: expected a mapping of settings, got [4]."),
    ("  weights:\n", "  Weights:\n", "5:3: levels.Weights: a level's name is a word of a-z, 0-9 and _"),
    ("    objective: penalised\n", "", "5:3: levels.weights: 'objective' is missing; a level needs variables, an objective and an optimizer."),
    ("variables: linear", "variables: [linear]", "6:16: levels.weights.variables: expected a name or {name: {option: value}}, got ['linear']."),
    ("[penalty]", "[penalti]", "8:13: levels.weights.given[0]: no level named 'penalti'. Did you mean 'penalty'?"),
    ("[penalty]", "[weights]", "8:12: levels.weights.given: a level reads itself without listing itself."),
    ("    given: [penalty]\n", "", "14:18: levels.penalty.subject_to[0]: the response of 'weights' does not depend"),
    ("    batch: train", "    bacth: train", "9:5: levels.weights.bacth: unknown key. Did you mean 'batch'?"),
    ("    batch: train", "    every: 3", "12:3: levels.penalty.every: 'penalty' is due at iteration 1 and 'weights', which it is subject to, is not."),
    ("{sgd: {learning", "{sdg: {learning", "10:17: levels.weights.optimizer: no optimizer named 'sdg'. Did you mean 'sgd'?"),
    ("momentum: 0.5", "momentun: 0.5", "10:43: levels.weights.optimizer.sgd.momentun: unknown option. Did you mean 'momentum'?"),
    ("momentum: 0.5", "lr: 0.1", "10:43: levels.weights.optimizer.sgd.lr: unknown option. Did you mean 'learning_rate'?"),
    ("momentum: 0.5", "wd: 0.5", "10:43: levels.weights.optimizer.sgd.wd: unknown option. Did you mean 'weight_decay'?"),
    ("momentum: 0.5", "eps: 0.5", "10:43: levels.weights.optimizer.sgd.eps: unknown option.\n"),
    ("learning_rate: 1e-3", "eps: 1e-3", "17:24: levels.penalty.optimizer.adam.eps: unknown option. Did you mean 'epsilon'?"),
    ("learning_rate: 1e-3", "betas: [0.9, 0.99]", "17:24: levels.penalty.optimizer.adam.betas: unknown option. Did you mean 'beta1' and 'beta2'?"),
    ("momentum: 0.5", "momentum: '0.5'", "10:53: levels.weights.optimizer.sgd.momentum: expected a number"),
    ("momentum: 0.5", "momentum: 1.5", "10:53: levels.weights.optimizer.sgd.momentum: momentum must be at least 0 and below 1, got 1.5."),
    ("finite_difference", "finite_diference", "11:21: levels.weights.hypergradient: no method named 'finite_diference'. Did you mean 'finite_difference'?"),
    ("radius: 0.01", "radius: -1", "11:49: levels.weights.hypergradient.finite_difference.radius: radius must be positive, got -1.0."),
    ("{model: [weights]", "{model: [wights]", "18:22: evaluation.model[0]: no level named 'wights'. Did you mean 'weights'?"),
    ("{model: [weights]", "{select: 3", "18:22: evaluation.select: expected the name of a metric, such as validation.accuracy, got 3."),
]  # fmt: skip
WHOLE = [  # a file that cannot be changed into a graph
    ("", "1:1: the file is empty: a graph needs at least `problem` and `levels`."),
    ("- a\n- b\n", "1:1: expected a mapping of keys at the top, got a list."),
    ("problem: penalty\n---\nproblem: penalty\n", "2:1: not valid YAML: but found another document"),
    ("problem: [1, 2", "1:15: not valid YAML: expected ',' or ']'"),
    ("problem: " + "[" * 500 + "]" * 500, "1:73: not valid YAML: nested deeper than 64."),
    ("problem: &x [*x]", "1:10: an alias stands inside the value it names."),
    (BOMB, "more than 50000 values once aliases are expanded."),
    ("problem: \x07", "1:10: not valid YAML: the character '\\x07' is not allowed."),
]
OVERRIDDEN = [
    ("seed", "<override seed>: an override is written key=value, such as seed=1 or levels.meta.every=2."),
    ("sed=1", "<override sed=1>: sed: unknown key. Did you mean 'seed'?"),
    ("seed=010", "<override seed=010>: 010 is 10 to some readers of YAML"),
    ("seed=[1", "<override seed=[1>: not valid YAML: expected ',' or ']'"),
    ("extends=a.yaml", "<override extends=a.yaml>: `extends` stands in a file"),
    ("levels.weigths.steps=3", "<override levels.weigths.steps=3>: levels.weigths: no level named 'weigths'. Did you mean 'weights'?"),
    ("levels.penalty=null", "graph.yaml:8:13: levels.weights.given[0]: no level named 'penalty'."),
    ("levels.weights.hypergradient=unrol", "<override levels.weights.hypergradient=unrol>: levels.weights.hypergradient: no method named 'unrol'. Did you mean 'unroll'?"),
]  # fmt: skip
# What only the problem knows.
OF_PROBLEM = [
    ("train_per_class", "train_per_clas", "graph.yaml:3:8: data.train_per_clas: unknown key. Did you mean 'train_per_class'?"),
    ("train_per_class: 4", "train_per_class: four", "graph.yaml:3:25: data.train_per_class: expected a whole number, got 'four'."),
    ("train_per_class: 4", "train_per_class: 4.5", "graph.yaml:3:25: data.train_per_class: expected a whole number, got 4.5."),
    ("train_per_class: 4", "train_per_class: 500", "graph.yaml:3:7: data"),
    ("variables: linear", "variables: liner", "graph.yaml:6:16: levels.weights.variables: no variable named 'liner'. Did you mean 'linear'?"),
    ("variables: linear", "variables: {linear: {width: 3}}", "graph.yaml:6:26: levels.weights.variables.linear.width: unknown option; there are none."),
    ("objective: penalised", "objective: penalized", "graph.yaml:7:16: levels.weights.objective: no objective named 'penalized'. Did you mean 'penalised'?"),
    ("objective: penalised", "objective: {penalised: {weight: 1}}", "graph.yaml:7:29: levels.weights.objective.penalised.weight: unknown option; there are none."),
    ("batch: train", "batch: trian", "graph.yaml:9:12: levels.weights.batch: no stream named 'trian'. Did you mean 'train'?"),
    ("batch: validation", "batch: [train, validatoin]", "graph.yaml:16:20: levels.penalty.batch[1]: no stream named 'validatoin'. Did you mean 'validation'?"),
    ("initial: -3.0", "inital: -3.0", "graph.yaml:13:31: levels.penalty.variables.log_penalty.inital: unknown option. Did you mean 'initial'?"),
    ("initial: -3.0", "initial: small", "graph.yaml:13:40: levels.penalty.variables.log_penalty.initial: expected a number, got 'small'."),
    ("    batch: train", "    freeze: [wieght]\n    batch: train", "graph.yaml:9:14: levels.weights.freeze[0]: no part named 'wieght'. Did you mean 'weight'?"),
    ("objective: penalised", "objective: classification", "the response of 'weights' does not reach back to 'penalty'"),
]  # fmt: skip

PROGRAM = """
import io, json, sys, time
from contextlib import redirect_stderr
from mlo.cli import main
answers = {}
for key, arguments in json.load(sys.stdin).items():
    said, start = io.StringIO(), time.process_time()
    with redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as exited:
            answers[key] = [exited.code, said.getvalue(), time.process_time() - start]
print(json.dumps({"answers": answers, "torch": "torch" in sys.modules}))
"""
Answer = tuple[int, str, float]


def written(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "graph.yaml").write_text(text, encoding="utf-8")
    (folder / "other.yaml").write_text(GRAPH, encoding="utf-8")
    (folder / "notes.txt").write_text("iterations: 3\n", encoding="utf-8")


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """All wrong files and overrides, asked in one process: what each is answered, and whether torch was imported."""
    root = tmp_path_factory.mktemp("wrong")
    texts = [GRAPH.replace(old, new, 1) for old, new, _ in CHANGED] + [text for text, _ in WHOLE]
    asked: dict[str, list[str]] = {}
    for number, text in enumerate(texts):
        written(root / str(number), text)
        asked[text] = ["check", f"{number}/graph.yaml"]
        if "huge.yaml" in text:
            (root / str(number) / "huge.yaml").write_text("#" * (LARGEST_FILE + 1), encoding="utf-8")
    (root / "graph.yaml").write_text(GRAPH, encoding="utf-8")
    asked |= {override: ["run", "graph.yaml", override, "--dry-run"] for override, _ in OVERRIDDEN}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(asked),
        cwd=root,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_there_are_enough_of_them():
    assert len(CHANGED) + len(WHOLE) + len(OVERRIDDEN) + len(OF_PROBLEM) >= 80


def test_files_are_answered_without_torch(answered):
    assert not answered["torch"]


def judge(answer: Answer, message: str) -> None:
    code, said, seconds = answer
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert seconds < 1


@pytest.mark.parametrize(("old", "new", "message"), CHANGED)
def test_a_mistake_in_a_file(answered, old, new, message):
    assert GRAPH.count(old) >= 1
    judge(answered["answers"][GRAPH.replace(old, new, 1)], message)


@pytest.mark.parametrize(("text", "message"), WHOLE, ids=range(len(WHOLE)))
def test_a_file_that_is_no_graph(answered, text, message):
    judge(answered["answers"][text], message)


@pytest.mark.parametrize(("override", "message"), OVERRIDDEN)
def test_a_mistake_in_an_override(answered, override, message):
    judge(answered["answers"][override], message)


@pytest.mark.parametrize(("old", "new", "message"), OF_PROBLEM)
def test_a_mistake_that_only_the_problem_knows(
    mlo_command: Callable[..., tuple[int, str, str]], tmp_path, old, new, message
):
    (tmp_path / "graph.yaml").write_text(GRAPH.replace(old, new, 1), encoding="utf-8")
    start = time.process_time()
    code, _, said = mlo_command("check", "graph.yaml")
    judge((code, said, (time.process_time() - start) / 5), message)


def test_all_mistakes_of_a_stage_come_at_once(mlo_command, tmp_path):
    """Those of the file, and, once it has none, those of the problem."""
    wrong = GRAPH.replace("linear", "liner").replace("penalised", "penalized").replace("batch: train", "batch: trian")
    (tmp_path / "graph.yaml").write_text(wrong, encoding="utf-8")
    _, _, said = mlo_command("check", "graph.yaml")
    assert [line.split(": ")[0] for line in said.splitlines() if line[0] != " "] == [
        f"graph.yaml:{place}" for place in ("6:16", "7:16", "9:12")
    ]
    (tmp_path / "graph.yaml").write_text(
        wrong.replace("0.5", "fast").replace("[weights]", "[wights]").replace("10\n", "x\n"), encoding="utf-8"
    )
    _, _, said = mlo_command("check", "graph.yaml")
    assert [line.split(": ")[0] for line in said.splitlines() if line[0] != " "] == [
        f"graph.yaml:{place}" for place in ("2:13", "10:53", "15:18", "18:22")
    ]


def seconds_of(*arguments: str) -> float:
    """What a whole process takes of a processor: with one thread, its time on a machine that does nothing else."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "mlo", *arguments],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_answers_are_quick():
    assert seconds_of("--help") < 1
    assert seconds_of("check", "needs_aware", "levels.meta.hypergradient=neuman") < 1
    assert seconds_of("check", "needs_aware") < 5


def test_a_module_that_is_not_there_is_no_bug(mlo_command, tmp_path):
    (tmp_path / "graph.yaml").write_text(GRAPH.replace("penalty\n", "mine_alone\n", 1), encoding="utf-8")
    code, _, said = mlo_command("check", "graph.yaml", "--import", "mine_alone")
    assert (code, said) == (2, "--import mine_alone: there is no such module\n")
    with pytest.raises(mlo.SpecError, match=r"graph.yaml:1:10: problem: there is no module 'mine_alone' to import it"):
        mlo.load("graph.yaml", imports=["mine_alone"]).build()


def test_a_problem_that_lies_here_is_named_with_how_to_import_it(mlo_command, tmp_path):
    (tmp_path / "graph.yaml").write_text(GRAPH.replace("penalty\n", "noisy\n", 1), encoding="utf-8")
    assert "--import" not in mlo_command("check", "graph.yaml")[2]
    (tmp_path / "noisy.py").touch()
    code, _, said = mlo_command("check", "graph.yaml")
    assert code == 2
    assert said.startswith("graph.yaml:1:10: problem: no problem named 'noisy'.")
    assert said.endswith("\n  For a module of your own: --import noisy\n")


BUILT = [  # what `build` takes, what it returns, what is said of it
    ("settings, context", "mlo.Problem(variables={'w': torch.ones(2)}, objectives={})", "build: variables['w'] must be a function giving a tensor, got a tensor."),
    ("settings, context", "mlo.Problem(variables={'w': torch.nn.Linear(1, 1), 'v': [1.0]}, objectives={})", "build: variables['v'] must be a function giving a module, tensors by name, or a tensor, got a list."),
    ("settings, context", "mlo.Problem(variables={}, objectives={'f': 3})", "build: objectives['f'] must be a function of (values, batch) giving a loss, got an int."),
    ("settings, context", "mlo.Problem(variables={}, objectives={}, streams={'s': 3})", "build: streams['s'] must be a stream, or something to iterate over, got an int."),
    ("settings, context", "mlo.Problem(variables=None, objectives={})", "build: variables must be a mapping from names, got None."),
    ("settings, context", "mlo.Problem(variables={}, objectives={}, evaluate=3)", "build: evaluate must be a function giving an mlo.Evaluation, got an int."),
    ("settings, context", "None", "build: must return an mlo.Problem, got None."),
    ("settings", "None", "build: must be called build(settings, context): too many positional arguments."),
]  # fmt: skip


@pytest.mark.parametrize(("takes", "returned", "message"), BUILT)
def test_a_mistake_in_what_builds_the_problem(mlo_command, tmp_path, monkeypatch, takes, returned, message):
    monkeypatch.delitem(sys.modules, "built_wrong", raising=False)
    (tmp_path / "built_wrong.py").write_text(
        f"import torch, mlo\n\ndef build({takes}):\n    return {returned}\n", encoding="utf-8"
    )
    graph = GRAPH.replace("penalty\n", "built_wrong\n", 1).replace("data: {train_per_class: 4}\n", "")
    (tmp_path / "graph.yaml").write_text(graph, encoding="utf-8")
    code, _, said = mlo_command("check", "graph.yaml", "--import", "built_wrong")
    assert (code, said) == (2, f"graph.yaml:1:10: problem: built_wrong.{message}\n")


def test_paths_may_lead_anywhere_and_are_not_a_shell(mlo_command, tmp_path):
    """What an `extends` may not do is read what is no graph; `~` and `$HOME` are names like others."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "base.yml").write_text(GRAPH, encoding="utf-8")
    (tmp_path / "far" / "away" / "top.yaml").write_text("extends: ../../base.yml\n", encoding="utf-8")
    assert mlo_command("run", "far/away/top.yaml", "--dry-run")[0] == 0
    (tmp_path / "home.yaml").write_text("extends: ~/base.yml\n", encoding="utf-8")
    code, _, said = mlo_command("check", "home.yaml")
    assert code == 2
    assert said.startswith("home.yaml:1:10: extends: no graph '~/base.yml'.")


@pytest.mark.parametrize(
    ("batch", "missing"), [("train", "train"), ("[train, validation]", "noise"), ("[noise]", "train")]
)
def test_a_stream_that_an_objective_reads_and_its_level_does_not_draw(mlo_command, batch, missing):
    code, _, said = mlo_command("check", "mgr", f"levels.classifier.batch={batch}")
    assert code == 2
    assert said.startswith(f"an objective reads stream '{missing}' by name, and its batch does not hold it: list all")
    assert "\n  In the objective of level 'classifier', iteration 1, mgr.py:" in said

"""Graphs that do not load: what is said, and where it points."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

import pytest

# What is replaced in the graph of conftest.py, by what, and the lines of the error.
CHANGED = [
    ("problem: toy", "problem: tog", "1:10: problem: no problem named 'tog'. Did you mean 'toy'?"),
    ("problem: toy\n", "", "1:1: 'problem' is missing: the name of a problem."),
    ("problem: toy", "problem: 3", "1:10: problem: expected the name of a problem, got 3."),
    ("iterations: 10\n", "", "1:1: 'iterations' is missing: a whole number of at least 1, or {epochs: n}."),
    ("iterations: 10", "iteration: 10", "2:1: iteration: unknown key. Did you mean 'iterations'?"),
    ("10\n", "often\n", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got 'often'."),
    ("10\n", "0\n", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got 0."),
    ("10\n", "1.5\n", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got 1.5."),
    ("10\n", "true\n", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got true."),
    ("10\n", "{epoch: 3}\n", "2:13: iterations: expected a whole number of at least 1, or {epochs: n}, got {epoch: 3}."),
    ("{size: 4}", "[4]", "3:7: data: expected a mapping of settings, got [4]."),
    ("data: {size: 4}", "seed: -1", "3:7: seed: expected a whole number of at least 0, got -1."),
    ("data: {size: 4}", "seed: '1'", "3:7: seed: expected a whole number of at least 0, got '1'."),
    ("data: {size: 4}", "name: ''", "3:7: name: expected a name, got ''."),
    ("data: {size: 4}", "device: gpu", "3:9: device: expected a device, such as cpu, cuda or cuda:1, got 'gpu'."),
    ("data: {size: 4}", "dtype: float46", "3:8: dtype: expected float32, float64 or bfloat16, got 'float46'. Did you mean 'float64'?"),
    ("data: {size: 4}", "checkpoint: 3", "3:13: checkpoint: expected a mapping, such as {every: 100}, got 3."),
    ("data: {size: 4}", "checkpoint: {}", "3:1: checkpoint: 'every' is missing: a whole number of at least 1, or {epochs: n}."),
    ("data: {size: 4}", "evaluation: {evry: 3}", "3:14: evaluation.evry: unknown key. Did you mean 'every'?"),
    ("data: {size: 4}", "evaluation: {model: wheights}", "3:21: evaluation.model: no level named 'wheights'. Did you mean 'weights'?"),
    ("data: {size: 4}", "evaluation: {model: [penalty, p]}", "3:31: evaluation.model[1]: no level named 'p'."),
    ("data: {size: 4}", "evaluation: {pictures_at: 0}", "3:27: evaluation.pictures_at: expected a whole number of at least 1, {epochs: n}, or a list of these, got 0."),
    ("data: {size: 4}", "evaluation: {pictures_at: [3, often]}", "3:27: evaluation.pictures_at: expected a whole number of at least 1, {epochs: n}, or a list of these, got [3, 'often']."),
    ("data: {size: 4}", "evaluation: {picture_at: 3}", "3:14: evaluation.picture_at: unknown key. Did you mean 'pictures_at'?"),
    ("data: {size: 4}", "evaluation: {select: 3}", "3:22: evaluation.select: expected the name of a metric, such as validation.accuracy, got 3."),
    ("data: {size: 4}", "start: {weights: 3}", "3:18: start.weights: expected the path of a graph, or {graph: path, with: {…}}, got 3."),
    ("data: {size: 4}", "start: {weights: gone.yaml}", "3:18: start.weights: no graph 'gone.yaml'."),
    ("data: {size: 4}", "start: gan.yaml", "3:8: start: expected a mapping from level names to paths of graphs, got 'gan.yaml'."),
    ("    batch: train", "    bacth: train", "9:5: levels.weights.bacth: unknown key. Did you mean 'batch'?"),
    ("    batch: train", "    name: train", "9:5: levels.weights.name: a level's name is its key, not a key inside it."),
    ("    batch: train", "    batch: 3", "9:12: levels.weights.batch: expected the name of a stream, or a list of names, got 3."),
    ("    batch: train", "    steps: -1", "9:12: levels.weights.steps: expected a whole number of at least 0, got -1."),
    ("    batch: train", "    steps: 0", "9:12: levels.weights.steps: expected a whole number of at least 1, got 0."),
    ("    batch: train", "    warm_up: {epochs: 0.5}", "9:14: levels.weights.warm_up: expected a whole number of at least 0, or {epochs: n}, got {epochs: 0.5}."),
    ("    batch: train", "    lookahead: on", "9:16: levels.weights.lookahead: expected true or false, got 'on'."),
    ("    batch: train", "    freeze: {a: b}", "9:13: levels.weights.freeze: expected a name or a list of names, got {a: 'b'}."),
    ("{linear: {width: 3}}", "[linear]", "6:16: levels.weights.variables: expected a name or {name: {option: value}}, got ['linear']."),
    ("objective: fit", "objective: {fit: {}, more: {}}", "7:16: levels.weights.objective: expected a name or {name: {option: value}}, got {fit: {}, more: {}}."),
    ("    objective: fit\n", "", "5:3: levels.weights: 'objective' is missing; a level needs variables, an objective and an optimizer."),
    ("[penalty]", "[penalti]", "8:13: levels.weights.given[0]: no level named 'penalti'. Did you mean 'penalty'?"),
    ("[penalty]", "[weights]", "8:12: levels.weights.given: a level reads itself without listing itself."),
    ("[penalty]", "[1]", "8:12: levels.weights.given: expected a name or a list of names, got [1]."),
    ("    given: [penalty]\n", "", "14:18: levels.penalty.subject_to[0]: the response of 'weights' does not depend"),
    ("{sgd: {learning", "{sdg: {learning", "10:17: levels.weights.optimizer: no optimizer named 'sdg'. Did you mean 'sgd'?"),
    ("momentum: 0.5", "momentun: 0.5", "10:43: levels.weights.optimizer.sgd.momentun: unknown option. Did you mean 'momentum'?"),
    ("momentum: 0.5", "momentum: fast", "10:53: levels.weights.optimizer.sgd.momentum: expected a number, a schedule (constant, cosine, multi_step, warm_up) or {level: …, name: …}, got 'fast'."),
    ("momentum: 0.5", "momentum: true", "10:53: levels.weights.optimizer.sgd.momentum: expected a number, a schedule (constant, cosine, multi_step, warm_up) or {level: …, name: …}, got true."),
    ("momentum: 0.5", "momentum: {level: penalti}", "10:61: levels.weights.optimizer.sgd.momentum.level: no level named 'penalti'. Did you mean 'penalty'?"),
    ("momentum: 0.5", "momentum: {level: weights}", "10:61: levels.weights.optimizer.sgd.momentum.level: an optimizer cannot read the level that it moves."),
    ("momentum: 0.5", "momentum: {level: 3}", "10:61: levels.weights.optimizer.sgd.momentum.level: expected text, got 3."),
    ("momentum: 0.5", "momentum: {name: m}", "10:43: levels.weights.optimizer.sgd.momentum: 'level' is missing: text."),
    ("momentum: 0.5", "momentum: {level: penalty, nam: m}", "10:70: levels.weights.optimizer.sgd.momentum.nam: unknown option. Did you mean 'name'?"),
    ("momentum: 0.5", "momentum: {levle: penalty}", "10:53: levels.weights.optimizer.sgd.momentum: expected a number, a schedule (constant, cosine, multi_step, warm_up) or {level: …, name: …}, got {levle: 'penalty'}."),
    ("momentum: 0.5", "groups: {'b*': {momentum: {level: penalti}}}", "10:77: levels.weights.optimizer.sgd.groups.b*.momentum.level: no level named 'penalti'."),
    ("momentum: 0.5", "momentum: {level: penalty}", "11:21: levels.weights.hypergradient: FiniteDifference does not follow the optimizer's steps: how the response depends on momentum, read from 'penalty', would be left out without a word; `unroll` follows them."),
    ("1e-3", "{level: weights}", "17:47: levels.penalty.optimizer.adam.learning_rate.level: 'weights' is listed under `subject_to`: an optimizer reads what is given."),
    ("momentum: 0.5", "nesterov: 1", "10:53: levels.weights.optimizer.sgd.nesterov: expected true or false, got 1."),
    ("momentum: 0.5", "momentum: 1.5", "10:53: levels.weights.optimizer.sgd.momentum: momentum must be at least 0 and below 1, got 1.5."),
    ("learning_rate: 0.1, ", "", "10:17: levels.weights.optimizer.sgd: 'learning_rate' is missing: a number, a schedule (constant, cosine, multi_step, warm_up) or {level: …, name: …}."),
    ("{sgd: {learning_rate: 0.1, momentum: 0.5}}", "sgd", "10:16: levels.weights.optimizer.sgd: 'learning_rate' is missing: a number, a schedule (constant, cosine, multi_step, warm_up) or {level: …, name: …}."),
    ("{sgd: {learning", "{none: {learning", "10:17: levels.weights.optimizer.none: a level without an optimizer has no options for it."),
    ("finite_difference", "finite_diference", "11:21: levels.weights.hypergradient: no method named 'finite_diference'. Did you mean 'finite_difference'?"),
    ("radius: 0.01", "radius: -1", "11:49: levels.weights.hypergradient.finite_difference.radius: radius must be positive, got -1.0."),
    ("{finite_difference: {radius: 0.01}}", "{neumann: {terms: 20, step_size: atuo}}", "11:53: levels.weights.hypergradient.neumann.step_size: expected a number or auto, got 'atuo'. Did you mean 'auto'?"),
    ("{finite_difference: {radius: 0.01}}", "{neumann: {terms: 20, step_size: true}}", "11:53: levels.weights.hypergradient.neumann.step_size: expected a number or auto, got true."),
    ("{finite_difference: {radius: 0.01}}", "{neumann: {terms: 20, step_size: 0}}", "11:53: levels.weights.hypergradient.neumann.step_size: step_size must be positive, got 0.0."),
    ("{finite_difference: {radius: 0.01}}", "{nystrom: {rank: 5}}", "11:21: levels.weights.hypergradient.nystrom: 'damping' is missing: a number."),
    ("{finite_difference: {radius: 0.01}}", "{nystrom: {rank: 5, damping: 0}}", "11:49: levels.weights.hypergradient.nystrom.damping: damping must be positive, got 0.0."),
    ("{finite_difference: {radius: 0.01}}", "{conjugate_gradient: {iterations: 5, warm_start: 1}}", "11:69: levels.weights.hypergradient.conjugate_gradient.warm_start: expected true or false, got 1."),
    ("  weights:\n", "  Weights:\n", "5:3: levels.Weights: a level's name is a word of a-z, 0-9 and _ that starts with no digit, got 'Weights'."),
    ("learning_rate: 0.1", "learning_rate: {multi_stop: {start: 1}}", "10:38: levels.weights.optimizer.sgd.learning_rate: no schedule named 'multi_stop'. Did you mean 'multi_step'?"),
    ("learning_rate: 0.1", "learning_rate: {cosine: {start: 1}}", "10:39: levels.weights.optimizer.sgd.learning_rate.cosine: 'over' is missing: a whole number or {epochs: …}."),
    ("learning_rate: 0.1", "learning_rate: {cosine: {start: 1, over: 0}}", "10:64: levels.weights.optimizer.sgd.learning_rate.cosine.over: over must be at least 1, got 0."),
    ("learning_rate: 0.1", "learning_rate: {cosine: {start: -1, over: 9}}", "10:38: levels.weights.optimizer.sgd.learning_rate: learning_rate must be positive"),
    ("learning_rate: 0.1", "learning_rate: {cosine: {start: 1, over: {epochs: [1, 2]}}}", "10:64: levels.weights.optimizer.sgd.learning_rate.cosine.over: over must be one duration, got 2."),
    ("learning_rate: 0.1", "learning_rate: {multi_step: {start: 1, at: {epochs: [2, 1]}}}", "10:66: levels.weights.optimizer.sgd.learning_rate.multi_step.at: at must be increasing durations of at least 1, got [2, 1]."),
    ("learning_rate: 0.1", "learning_rate: {multi_step: {start: 1, at: {epoch: 1}}}", "10:67: levels.weights.optimizer.sgd.learning_rate.multi_step.at.epoch: unknown option. Did you mean 'epochs'?"),
    ("learning_rate: 0.1", "learning_rate: {warm_up: {over: 3, then: {cosine: {start: 1, over: x}}}}", "10:90: levels.weights.optimizer.sgd.learning_rate.warm_up.then.cosine.over: expected a whole number or {epochs: …}, got 'x'."),
    ("momentum: 0.5", "momentum: {cosine: {start: 0.5, end: 1, over: 9}}", "10:53: levels.weights.optimizer.sgd.momentum: momentum must be at least 0 and below 1"),
    ("momentum: 0.5", "clip_norm: 0", "10:54: levels.weights.optimizer.sgd.clip_norm: clip_norm must be positive, got 0.0."),
    ("momentum: 0.5", "groups: [a]", "10:51: levels.weights.optimizer.sgd.groups: expected a mapping from names"),
    ("momentum: 0.5", 'groups: {"*.bias": 3}', "10:62: levels.weights.optimizer.sgd.groups.\"*.bias\": expected a mapping of options, got 3."),
    ("momentum: 0.5", 'groups: {"*.bias": {momentun: 0}}', "10:63: levels.weights.optimizer.sgd.groups.\"*.bias\".momentun: unknown option. Did you mean 'momentum'?"),
    ("momentum: 0.5", 'groups: {"*.bias": {momentum: 2}}', "10:73: levels.weights.optimizer.sgd.groups.\"*.bias\".momentum: momentum must be at least 0 and below 1, got 2.0."),
    ("momentum: 0.5", 'groups: {"*.bias": {clip_norm: 2}}', "10:63: levels.weights.optimizer.sgd.groups.\"*.bias\".clip_norm: the gradient is clipped as a whole, not by group."),
    ("momentum: 0.5", "groups: {bias: {nesterov: true}}", "10:69: levels.weights.optimizer.sgd.groups.bias.nesterov: nesterov needs momentum above 0 and dampening 0."),
    ("    batch: train", "    constraints: {a: sigmod}", "9:18: levels.weights.constraints: expected softplus, sigmoid or softmax, or a mapping from names to these, got {a: 'sigmod'}."),
    ("    batch: train", "    constraints: sigmod", "9:18: levels.weights.constraints: expected softplus, sigmoid or softmax, or a mapping from names to these, got 'sigmod'."),
    ("data: {size: 4}", "dtype: bfloat16", "11:21: levels.weights.hypergradient: differences of gradients drown in the rounding of dtype bfloat16 (13 % off"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), CHANGED)
def test_a_mistake_is_named_where_it_was_made(refused, graph, old, new, message):
    assert graph.count(old) >= 1
    lines = refused(graph.replace(old, new, 1))
    assert any(line.startswith(f"graph.yaml:{message}") for line in lines), lines


def test_known_names_follow_on_a_line_of_their_own(refused, graph):
    lines = refused(graph.replace("finite_difference", "finite_diference"))
    assert lines[0].endswith("Did you mean 'finite_difference'?")
    assert lines[1].startswith("  Known: ")
    assert "finite_difference" in lines[1]
    assert lines[1].endswith(".")


OVERRIDDEN = [
    ("seed", "<override seed>: an override is written key=value, such as seed=1 or levels.meta.every=2."),
    ("=1", "<override =1>: an override is written key=value, such as seed=1 or levels.meta.every=2."),
    ("a..b=1", "<override a..b=1>: 'a..b' is not a path of keys, such as levels.meta.every."),
    ("seed=", "<override seed=>: no value for 'seed'; write seed=null to remove it."),
    ("seed=x", "<override seed=x>: seed: expected a whole number of at least 0, got 'x'."),
    ("sed=1", "<override sed=1>: sed: unknown key. Did you mean 'seed'?"),
    ("sed=null", "<override sed=null>: sed: unknown key. Did you mean 'seed'?"),
    ("seed=[1", "<override seed=[1>: not valid YAML: expected ',' or ']'"),
    ("extends=a.yaml", "<override extends=a.yaml>: `extends` stands in a file"),
    ("data.sise=null", "<override data.sise=null>: data.sise: there is no 'sise' to remove. Did you mean 'size'?"),
    ("levels.weigths=null", "<override levels.weigths=null>: levels.weigths: nothing to remove: no level named 'weigths'. Did you mean 'weights'?"),
    ("levels.weigths.steps=3", "<override levels.weigths.steps=3>: levels.weigths: no level named 'weigths'. Did you mean 'weights'?"),
    ("levels.weights.optimizer.sgd.momentun=null", "<override levels.weights.optimizer.sgd.momentun=null>: levels.weights.optimizer.sgd.momentun: there is no 'momentun' to remove. Did you mean 'momentum'?"),
    ("levels.weights.hypergradient=neuman", "<override levels.weights.hypergradient=neuman>: levels.weights.hypergradient: no method named 'neuman'."),
    ("levels.weights.optimizer=null", "graph.yaml:5:3: levels.weights: 'optimizer' is missing; a level needs variables, an objective and an optimizer (`optimizer: none` makes it a constant)."),
    ("levels.penalty=null", "graph.yaml:8:13: levels.weights.given[0]: no level named 'penalty'."),
    ("levels=null", "graph.yaml:1:1: 'levels' is missing: a mapping from level names to levels."),
    ("levels.penalty=3", "<override levels.penalty=3>: levels.penalty: expected a mapping of keys, got 3."),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), OVERRIDDEN)
def test_a_wrong_override_is_its_own_place(refused, graph, override, message):
    lines = refused(graph, override)
    assert any(line.startswith(message) for line in lines), lines


def test_all_mistakes_come_at_once_in_the_order_of_the_file(refused, graph):
    wrong = graph.replace("toy", "tog").replace("0.5", "fast").replace("[weights]", "[weigths]").replace("train", "3")
    lines = [line for line in refused(wrong, "seed=x", "foo") if not line.startswith("  ")]
    places = [line.split(": ")[0] for line in lines]
    assert places == [
        "graph.yaml:1:10", "graph.yaml:9:12", "graph.yaml:10:53", "graph.yaml:15:18", "<override foo>", "<override seed=x>"
    ]  # fmt: skip


def test_structure_is_judged_although_a_method_is_wrong(refused, graph):
    text = "\n".join(refused(graph.replace("finite_difference", "neuman").replace("[penalty]", "[penalti]")))
    assert "no method named 'neuman'" in text
    assert "no level named 'penalti'" in text


def test_a_cycle_of_levels_is_printed(refused, graph):
    lines = refused(graph.replace("subject_to: [weights]", "given: [weights]"))
    assert "levels read each other in a cycle: penalty → weights → penalty" in lines[0]


def test_due_times_in_epochs_are_left_to_the_problem(read, graph):
    spec = read(
        graph, "levels.weights.every=60", "levels.weights.warm_up={epochs: 30}", "levels.penalty.every={epochs: 1}"
    )
    assert spec.levels["weights"].warm_up.epochs == 30
    assert spec.levels["penalty"].every.epochs == 1


def test_a_graph_needs_levels(refused):
    assert refused("problem: toy\niterations: 1\nlevels: {}") == [
        "graph.yaml:3:9: levels: a graph needs at least one level."
    ]
    assert refused("problem: toy\niterations: 1\nlevels: [a]") == [
        "graph.yaml:3:9: levels: expected a mapping from level names to levels, got ['a']."
    ]

"""What becomes of schedules, groups, constraints and bfloat16 once the problem is built."""
# ruff: noqa: E501 - a case a line

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import mlo
from mlo.optimizer import SGD, AdamW, Read
from mlo.schedule import Cosine, MultiStep, WarmUp

PROBLEM = """
import torch
import mlo

seen = []


def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:
    data = {"x": torch.ones(100, 3, dtype=context.dtype)}
    return mlo.Problem(
        variables={"network": network, "policy": policy},
        objectives={"fit": fit, "judge": judge},
        streams={"train": mlo.stream.Shuffled(data, size=10), "spare": mlo.stream.Shuffled(data, size=10), "same": mlo.stream.Constant(data)},
    )


def network():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))


def policy(*, initial: float = 0.5, length: int = 3):
    if length != 3:
        raise ValueError(f"length is {length}; it must be 3" if length > 0 else "too short")
    if initial < 0:
        raise mlo.UserError(f"initial={initial}: it must be at least 0")
    return {"p": torch.full((3,), initial), "mu": torch.zeros(2)}


def fit(values, batch, *, weight: float = 1.0, power: int = 2):
    output = values["w"](batch["x"] * values["u"]["p"])
    seen.append((values.iteration, weight, output.dtype))
    return weight * (output**power).mean() + values["u"]["mu"].sum() * output.mean()


def judge(values, batch):
    return values["w"](batch["x"]).mean(), {"p": values["u"]["p"].mean()}
"""
GRAPH = """\
problem: made_up
iterations: 6
levels:
  w:
    variables: network
    objective: fit
    given: [u]
    batch: train
    optimizer: {sgd: {learning_rate: 0.1}}
  u:
    variables: policy
    objective: judge
    subject_to: [w]
    batch: train
    constraints: {p: sigmoid}
    optimizer: {adam: {learning_rate: 0.1}}
"""
Built = Callable[..., mlo.Graph]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., mlo.Spec]]:
    """Load a graph whose problem lies beside it."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_up.py").write_text(PROBLEM)

    def load(text: str = GRAPH, *overrides: str) -> mlo.Spec:
        (tmp_path / "graph.yaml").write_text(text, encoding="utf-8")
        return mlo.load("graph.yaml", *overrides, imports=["made_up"])

    yield load
    sys.modules.pop("made_up", None)


RATE = "levels.w.optimizer.sgd.learning_rate="


def test_epochs_are_passes_over_the_levels_own_stream(load):
    graph, _ = load(GRAPH, f"{RATE}{{multi_step: {{start: 0.5, at: {{epochs: [2, 3]}}}}}}").build()
    assert graph.levels["w"].optimizer == SGD(learning_rate=MultiStep(start=0.5, at=(20, 30)))
    graph, _ = load(GRAPH, f"{RATE}{{cosine: {{start: 0.5, over: {{epochs: 4}}}}}}", "levels.w.steps=5").build()
    assert graph.levels["w"].optimizer == SGD(learning_rate=Cosine(start=0.5, over=8))
    nested = "{warm_up: {over: 3, then: {cosine: {start: 0.5, over: {epochs: 4}}}}}"
    graph, _ = load(GRAPH, f"{RATE}{nested}").build()
    assert graph.levels["w"].optimizer == SGD(learning_rate=WarmUp(over=3, then=Cosine(start=0.5, over=40)))


def test_epochs_may_be_those_of_another_stream(load):
    """A policy above a classifier waits for the classifier's epochs: `w` passes over 100 samples in 10 iterations."""
    whole = GRAPH.replace("    subject_to: [w]\n    batch: train", "    subject_to: [w]\n    batch: same")
    for warm_up, steps, iterations in (
        ("{epochs: 3}", 1, 3),
        ("{epochs: 3, of: train}", 1, 30),
        ("{epochs: 3, of: train}", 5, 6),
        ("{epochs: 3, of: same}", 1, 3),
    ):
        graph, _ = load(whole, f"levels.u.warm_up={warm_up}", f"levels.w.steps={steps}").build()
        assert graph.levels["u"].warm_up == iterations


def test_any_number_of_an_objective_may_be_a_schedule(load):
    spec = load(GRAPH, "levels.w.objective={fit: {weight: {multi_step: {start: 8, factor: 0.5, at: [2, 3]}}}}")
    graph, problem = spec.build()
    import made_up  # beside the graph

    state, batch = graph.init(), {"x": torch.ones(4, 3)}
    for _ in range(4):
        state, _ = graph.step(state, {"w": batch, "u": batch})
    assert [(iteration, weight) for iteration, weight, _ in made_up.seen] == [(1, 8.0), (2, 8.0), (3, 4.0), (4, 2.0)]
    assert problem.objectives["fit"] is made_up.fit
    plain, _ = load(GRAPH, "levels.w.objective={fit: {weight: 8}}").build()
    assert plain.levels["w"].objective.options == {"weight": 8.0}


def test_groups_and_clipping_reach_the_level(load):
    groups = '{"*.bias": {weight_decay: 0, learning_rate: {cosine: {start: 1, over: {epochs: 1}}}}}'
    spec = load(GRAPH, f"levels.w.optimizer={{adamw: {{clip_norm: 1, groups: {groups}}}}}")
    optimizer = spec.build()[0].levels["w"].optimizer
    changes = {"weight_decay": 0.0, "learning_rate": Cosine(start=1.0, over=10)}
    assert optimizer == AdamW(clip_norm=1.0, groups={"*.bias": changes})


def test_constraints_reach_the_level_and_survive_being_written(load):
    spec = load()
    graph, _ = spec.build()
    assert torch.equal(graph.init().values["u"]["p"], torch.zeros(3))
    written = spec.to_yaml()
    assert load(written).levels["u"].constraints == {"p": "sigmoid"}
    assert load(written).hash == spec.hash
    assert load(GRAPH.replace("{p: sigmoid}", "Sigmoid"), "levels.u.variables={policy: {}}").levels[
        "u"
    ].constraints == {"*": "sigmoid"}


def test_options_that_are_read_reach_the_level_and_survive_being_written(load):
    optimizer = "levels.w.optimizer={sgd: {learning_rate: {level: u}}}"
    with pytest.raises(mlo.SpecError, match=r"sgd\.learning_rate: 'u' holds several tensors: name one"):
        load(GRAPH, optimizer).build()
    spec = load(
        GRAPH, "levels.w.optimizer={sgd: {learning_rate: {level: u, name: p}, groups: {'*': {learning_rate: 0.1}}}}"
    )
    graph, _ = spec.build()
    assert graph.levels["w"].optimizer == SGD(learning_rate=Read("u", "p"), groups={"*": {"learning_rate": 0.1}})
    written = spec.to_yaml()
    assert load(written).hash == spec.hash
    assert load(written).build()[0].levels["w"].optimizer == graph.levels["w"].optimizer


WRONG = [
    ("learning_rate: 0.1}}\n  u", "learning_rate: {level: u, name: p}}}\n  u",
     "9:38: levels.w.optimizer.sgd.learning_rate: 'u.p' has shape (3,); expected one number or the shape of what it is for: parameter '0.weight' has (4, 3)."),
    ("learning_rate: 0.1}}\n  u", "learning_rate: {level: u, name: q}}}\n  u",
     "9:38: levels.w.optimizer.sgd.learning_rate: 'u' has no tensor 'q', nor a 'q.0.weight' for each parameter.\n  Known: mu, p."),
    ("learning_rate: 0.1}}\n  u", "learning_rate: 0.1, groups: {\"*.bias\": {momentum: {level: u, name: p}}}}}\n  u",
     "9:73: levels.w.optimizer.sgd.groups.\"*.bias\".momentum: 'u.p' has shape (3,); expected one number or the shape of what it is for: parameter '0.bias' has (4,)."),
    ("learning_rate: 0.1}}\n  u", "groups: {\"*.bais\": {}}, learning_rate: 0.1}}\n  u",
     "9:32: levels.w.optimizer.sgd.groups.\"*.bais\": no parameter matches '*.bais'.\n  Known: 0.bias, 0.weight, 1.bias, 1.weight."),
    ("{p: sigmoid}", "{q: sigmoid}", "15:19: levels.u.constraints.q: no parameter matches 'q'.\n  Known: mu, p."),
    ("{p: sigmoid}", "{mu: softplus}", "15:18: levels.u.constraints: 'mu' must be above 0 for softplus to reach, starts at 0"),
    ("variables: policy", "variables: {policy: {initial: 1}}",
     "15:18: levels.u.constraints: 'p' must be above 0 and below 1 for a sigmoid to reach, starts at 1"),
    ("variables: policy", "variables: {policy: {length: 4}}",
     "11:34: levels.u.variables.policy.length: length is 4; it must be 3."),
    ("variables: policy", "variables: {policy: {length: 0}}", "11:17: levels.u.variables: too short."),
    ("variables: policy", "variables: {policy: {initial: -1}}",
     "11:35: levels.u.variables.policy.initial: initial=-1.0: it must be at least 0."),
    ("objective: fit", "objective: {fit: {weight: {cosin: {start: 1}}}}",
     "6:31: levels.w.objective.fit.weight: no schedule named 'cosin'. Did you mean 'cosine'?"),
    ("objective: fit", "objective: {fit: {power: {cosine: {start: 1, over: 9}}}}",
     "6:30: levels.w.objective.fit.power: expected a whole number, got {cosine: {start: 1, over: 9}}."),
    ("iterations: 6", "iterations: {epochs: 2, of: trian}",
     "2:29: iterations.of: no stream named 'trian'. Did you mean 'train'?"),
    ("iterations: 6", "iterations: {epochs: 2, of: spare}",
     "2:29: iterations.of: no level's batch is drawn from stream 'spare'."),
    ("    batch: train\n    optimizer: {sgd: {learning_rate: 0.1",
     "    optimizer: {sgd: {learning_rate: {cosine: {start: 1, over: {epochs: 2}}}",
     "8:17: levels.w.optimizer: there is no stream with an end to count passes over; give iterations."),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_mistakes_that_only_the_problem_shows_have_their_place(load, old, new, message):
    spec = load(GRAPH.replace(old, new, 1))
    with pytest.raises(mlo.SpecError) as caught:
        spec.build()
    assert str(caught.value).startswith(f"graph.yaml:{message}")


def test_bfloat16_is_autocast_of_objectives_alone(load):
    graph, _ = load(GRAPH, "dtype=bfloat16").build()
    import made_up  # beside the graph

    state, batch = graph.init(), {"x": torch.ones(4, 3)}
    exact, _ = load().build()
    found, right = (one.parts("u", state, {"w": batch, "u": batch}).indirect for one in (graph, exact))
    state, metrics = graph.step(state, {"w": batch, "u": batch})
    assert [dtype for *_, dtype in made_up.seen] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for tensors in (*state.values.values(), *state.optimizers["u"].moments.values()):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert metrics.losses["w"].dtype == torch.float32
    for name, tensor in right.items():
        assert torch.allclose(found[name], tensor, rtol=0.03, atol=1e-6)
        assert not torch.equal(found[name], tensor)


def test_what_bfloat16_makes_meaningless_is_refused(load):
    with pytest.raises(mlo.SpecError, match=r"levels.w.hypergradient: differences of gradients drown in the rounding"):
        load(GRAPH, "dtype=bfloat16", "levels.w.hypergradient=finite_difference")
    load(GRAPH, "dtype=bfloat16", "levels.w.hypergradient=unroll")


def test_a_run_keeps_free_numbers_and_groups_and_others_start_from_what_is_seen(load, tmp_path):
    groups = "levels.w.optimizer={sgd: {learning_rate: 0.1, momentum: 0.9, groups: {1.bias: {momentum: 0}}}}"
    run = mlo.run(load(GRAPH, groups), tmp_path / "run", quiet=True)
    state = run.state("latest")
    assert set(state.optimizers["w"].moments["momentum"]) == {"0.weight", "0.bias", "1.weight"}
    seen = run.graph.values(state, ["u"])["u"]["p"]
    assert torch.equal(seen, state.values["u"]["p"].sigmoid())
    (tmp_path / "other.yaml").write_text(
        GRAPH.replace("constraints: {p: sigmoid}", "constraints: {p: softplus}")
        + "start: {u: {graph: graph.yaml, with: {iterations: 2}}}\n"
    )
    load()
    spec = mlo.load("other.yaml", "levels.u.optimizer=none", "levels.u.subject_to=null", imports=["made_up"])
    other = mlo.run(spec, tmp_path / "other", cache=tmp_path / "cache", quiet=True)
    started = next((tmp_path / "cache").iterdir())
    first = mlo.open_run(started)
    expected = first.graph.values(first.state("latest"), ["u"])["u"]["p"]
    found = other.graph.values(other.state("latest"), ["u"])["u"]["p"]
    assert torch.allclose(found, expected, rtol=1e-5)
    assert not torch.allclose(found, torch.full((3,), 0.5), rtol=1e-5)

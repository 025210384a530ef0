"""`values.shared`: the same derivatives as without it, from one computation where a step is evaluated several times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal, relative_error
from torch import Tensor, nn

import mlo
from mlo.hypergradient import CentralDifference, FiniteDifference, Implicit, Neumann, Unroll

INPUTS, SIZE, SAMPLES = 3, 4, 6
SEEN = normal(SAMPLES, INPUTS, seed=1)


class Problem:
    """A student of a teacher's answers to inputs that a finder moves; the finder is read beside them, too."""

    def __init__(self, *, shared: bool, noise: bool = False, own: bool = False) -> None:
        self.is_shared, self.noise, self.own, self.computed = shared, noise, own, 0

    def answers(self, values: Any, x: Tensor) -> dict[str, Tensor]:
        self.computed += 1
        moved = x + (x @ values["finder"]["move"]).tanh()
        if self.noise:
            moved = moved + 0.1 * torch.randn(SAMPLES, INPUTS)
        if self.own:
            moved = moved * values["student"]["out"].sum()
        return {"moved": moved, "answer": (moved @ values["teacher"]).sin(), "fixed": x}

    def fit(self, values: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        found = (
            values.shared("answers", lambda: self.answers(values, batch["x"]))
            if self.is_shared
            else self.answers(values, batch["x"])
        )
        student = values["student"]
        keep = torch.rand(SAMPLES, SIZE) if self.noise else torch.ones(SAMPLES, SIZE)
        says = ((found["moved"] @ student["in"]).tanh() * keep) @ student["out"]
        loss = (says - found["answer"]).square().mean() + values["finder"]["decay"].exp() * student["in"].square().sum()
        return loss + 1e-2 * (found["fixed"] @ student["in"]).square().mean(), {"keep": keep, "answer": found["answer"]}

    def graph(self, method: Any, *, steps: int = 1, uppers: int = 1) -> mlo.Graph:
        def validate(values: Any, batch: Any) -> Tensor:
            student = values["student"]
            return (((SEEN @ student["in"]).tanh() @ student["out"]) - SEEN.sum(1)).square().mean()

        def other(values: Any, batch: Any) -> Tensor:
            return validate(values, batch) * 2 + values["teacher"].square().sum()

        student = mlo.Level(
            "student",
            objective=self.fit,
            variables={"in": normal(INPUTS, SIZE, seed=3), "out": normal(SIZE, seed=4)},
            given=["finder", "teacher"],
            optimizer=mlo.optimizer.SGD(learning_rate=0.1, momentum=0.9, nesterov=True),
            steps=steps,
            hypergradient=method,
        )
        rate = mlo.optimizer.Adam(learning_rate=1e-2)
        start = {"move": normal(INPUTS, INPUTS, seed=5), "decay": torch.tensor(-3.0)}
        finder = mlo.Level("finder", objective=validate, variables=start, subject_to=["student"], optimizer=rate)
        teacher = mlo.Level(
            "teacher",
            objective=other,
            variables=normal(INPUTS, seed=6),
            subject_to=["student"] if uppers > 1 else [],
            optimizer=rate if uppers > 1 else None,
        )
        return mlo.Graph([student, finder, teacher])


def drawn(seed: int) -> dict[str, Any]:
    return {"student": {"x": normal(SAMPLES, INPUTS, seed=seed)}}


def after(problem: Problem, method: Any, **options: Any) -> tuple[mlo.State, list[Any]]:
    graph = problem.graph(method, **options)
    state, seen = graph.init(seed=0), []
    for iteration in range(3):
        state, metrics = graph.step(state, drawn(10 + iteration))
        seen.append((metrics.losses, metrics.norms, metrics.gradients, metrics.products))
    return state, seen


METHODS = {
    "finite differences": FiniteDifference(radius=1e-3),
    "of a solution": Implicit(inverse=Neumann(terms=2, step_size=0.1), cross=CentralDifference(radius=1e-3)),
    "unrolled": Unroll(),
    "series": Neumann(terms=2, step_size=0.1),
}


@pytest.mark.parametrize("uppers", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nothing_but_the_cost_changes(method, steps, uppers):
    with_it, seen = after(Problem(shared=True), method, steps=steps, uppers=uppers)
    without, expected = after(Problem(shared=False), method, steps=steps, uppers=uppers)
    for name in ("student", "finder"):
        assert relative_error(with_it.values[name], without.values[name]) < 1e-9
    assert relative_error(with_it.values["teacher"], without.values["teacher"]) < 1e-9
    assert [counts[2:] for counts in seen] == [counts[2:] for counts in expected]


def test_central_differences_are_those_of_the_objective():
    """Exactly: against the formula written out, with what is read beside the shared part in it."""
    problem = Problem(shared=True)
    graph = problem.graph(FiniteDifference(radius=1e-3))
    state = graph.init(seed=0)
    state, _ = graph.step(state, drawn(1))  # from here on the step's own evaluation is used
    found = graph.hypergradient("finder", state, drawn(2))
    at = {name: dict(state.values[name]) for name in ("student", "finder")}
    plain = Problem(shared=False)

    def loss(student: Any, finder: Any) -> Tensor:
        return plain.fit(
            {"student": student, "finder": finder, "teacher": state.values["teacher"]}, drawn(2)["student"]
        )[0]

    def slope(function: Any, tree: Any) -> dict[str, Tensor]:
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in tree.items()}
        return dict(zip(leaves, torch.autograd.grad(function(leaves), [*leaves.values()]), strict=True))

    step = slope(lambda student: loss(student, at["finder"]), at["student"])
    momentum = state.optimizers["student"].moments["momentum"]
    after = {
        key: at["student"][key] - 0.1 * (step[key] + 0.9 * (0.9 * momentum[key] + step[key])) for key in step
    }  # Nesterov
    cotangent = slope(
        lambda student: (((SEEN @ student["in"]).tanh() @ student["out"]) - SEEN.sum(1)).square().mean(), after
    )
    q = {key: -0.1 * 1.9 * tensor for key, tensor in cotangent.items()}
    epsilon = 1e-3 / sum(tensor.square().sum() for tensor in q.values()).sqrt()
    sides = [
        slope(
            lambda finder, sign=sign: loss({key: at["student"][key] + sign * epsilon * q[key] for key in q}, finder),
            at["finder"],
        )
        for sign in (1, -1)
    ]
    right = {key: (sides[0][key] - sides[1][key]) / (2 * epsilon) for key in sides[0]}
    assert relative_error(found, right) < 1e-9


def test_computed_once_a_step():
    problem = Problem(shared=True)
    graph = problem.graph(FiniteDifference())
    state, counts = graph.init(seed=0), []
    for iteration in range(3):
        before = problem.computed
        state, _ = graph.step(state, drawn(iteration))
        counts.append(problem.computed - before)
    assert counts == [2, 1, 1]  # before the first step it is not known that there is something to share


def test_noise_is_that_of_the_step_wherever_it_is_drawn():
    """With noise as data in place of drawn noise, the same hypergradient."""
    problem = Problem(shared=True, noise=True)
    graph = problem.graph(FiniteDifference(radius=1e-3))
    state = graph.init(seed=0)
    for iteration in range(2):
        found = graph.hypergradient("finder", state, drawn(iteration))
        unrolled = Problem(shared=True, noise=True).graph(Unroll())
        right = unrolled.hypergradient(
            "finder", unrolled.init(seed=0, values=state.values) if not iteration else state, drawn(iteration)
        )
        assert relative_error(found, right) < 1e-5
        state, _ = graph.step(state, drawn(iteration))


@pytest.mark.parametrize("first", [True, False])
def test_the_levels_own_variables_in_it_are_refused(first):
    problem = Problem(shared=True, own=first)
    graph = problem.graph(FiniteDifference())
    state = graph.init(seed=0)
    if not first:
        state, _ = graph.step(state, drawn(1))
        problem.own = True
    with pytest.raises(
        mlo.UserError, match=r"'student' computes by `values.shared` depends .* leave values\['student'\] out"
    ):
        graph.step(state, drawn(2))


def test_a_module_that_is_read_and_a_compiled_step():
    torch.manual_seed(0)

    def fit(values: Any, batch: Any) -> Tensor:
        images = values.shared("images", lambda: values["generator"](batch, training=False))
        return (values["student"](images).squeeze(1) - images.sum(1)).square().mean()

    def validate(values: Any, batch: Any) -> Tensor:
        return (values["student"](SEEN).squeeze(1) - SEEN.sum(1)).square().mean()

    def graph(*, compile: Any) -> mlo.Graph:
        return mlo.Graph(
            [
                mlo.Level(
                    "student",
                    objective=fit,
                    variables=nn.Sequential(nn.Linear(INPUTS, SIZE), nn.Tanh(), nn.Linear(SIZE, 1)),
                    given=["generator"],
                    optimizer=mlo.optimizer.SGD(learning_rate=0.1),
                    hypergradient=FiniteDifference(),
                ),
                mlo.Level(
                    "generator",
                    objective=validate,
                    variables=nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.BatchNorm1d(INPUTS), nn.Tanh()),
                    subject_to=["student"],
                    optimizer=mlo.optimizer.Adam(learning_rate=1e-2),
                ),
            ],
            compile=compile,
        )

    plain, compiled = graph(compile=False), graph(compile="eager")
    start = plain.init(seed=0)
    states = [start, compiled.init(seed=0, values=start.values)]
    for iteration in range(3):
        batches = {"student": normal(SAMPLES, INPUTS, seed=iteration)}
        states = [each.step(state, batches)[0] for each, state in zip((plain, compiled), states, strict=True)]
    for name in ("student", "generator"):
        assert relative_error(states[1].values[name], states[0].values[name]) < 1e-9

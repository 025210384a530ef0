"""`values.shared`: the same derivatives as without it, from one computation where a step is evaluated several times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import normal, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


class Counted(TorchDispatchMode):
    """How often the error function was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "aten.erf." in str(function)
        return function(*args, **(kwargs or {}))


def test_computed_once_a_compiled_step_and_after_a_resume():
    def objective(values: Any, batch: Any) -> Tensor:
        return (values.shared("x", lambda: moved(values).erf()) @ values["student"]).square().mean()

    def counts(graph: mlo.Graph, state: mlo.State) -> tuple[list[int], mlo.State]:
        found: list[int] = []
        for _ in range(3):
            with Counted() as counted:
                state, _ = graph.step(state)
            found.append(counted.number)
        return found, state

    def compiled() -> mlo.Graph:
        return mlo.Graph(list(of_finder(objective, FiniteDifference()).levels.values()), compile="eager")

    graph = compiled()
    found, state = counts(graph, graph.init(seed=0))
    assert found[1:] == [1, 1]
    assert counts(compiled(), state)[0][1:] == [1, 1]


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


class Written:
    """Values for an objective in which what is shared stands as it is."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def shared(self, name: str, compute: Any) -> Any:
        return compute()


def moved(values: Any) -> Tensor:
    return SEEN + (SEEN @ values["finder"]["a"]).tanh()


def chained(values: Any, batch: Any) -> Tensor:
    x = values.shared("x", lambda: moved(values))
    y = values.shared("y", lambda: x.sin().sum(1) * values["finder"]["b"])
    z = values.shared("z", lambda: {"x": x * y[:, None], "y": y})
    return ((x + z["x"]) @ values["student"] - z["y"]).square().mean()


def nested(values: Any, batch: Any) -> Tensor:
    def outer() -> dict[str, Tensor]:
        x = values.shared("x", lambda: moved(values))
        return {"x": x, "y": x.sin().sum(1) * values["finder"]["b"]}

    found = values.shared("outer", outer)
    return (found["x"] @ values["student"] - found["y"]).square().mean()


def beside(values: Any, batch: Any) -> Tensor:
    """The finder is read inside and outside, and so is what is computed before."""
    before = (SEEN @ values["finder"]["a"]).tanh()
    x = values.shared("x", lambda: SEEN + before + values["finder"]["b"])
    x = x + values.shared("y", lambda: before.square())
    rest = before.mean() + values["finder"]["b"] * values["student"].square().sum()
    return (x @ values["student"] - SEEN.sum(1)).square().mean() + rest * values["student"].sum()


def of_finder(objective: Any, method: Any, *, constraints: Any = None, student: Any = None) -> mlo.Graph:
    def validate(values: Any, batch: Any) -> Tensor:
        return (SEEN @ values["student"]).tanh().square().mean()

    rate = mlo.optimizer.SGD(learning_rate=0.1)
    start = {"a": normal(INPUTS, INPUTS, seed=7).abs() + 0.1, "b": torch.tensor(0.5, dtype=torch.float64)}
    return mlo.Graph(
        [
            mlo.Level(
                "student",
                objective=objective,
                variables=normal(INPUTS, seed=8).abs(),
                given=["finder"],
                optimizer=rate,
                hypergradient=method,
                constraints=student or {},
            ),
            mlo.Level(
                "finder",
                objective=validate,
                variables=start,
                subject_to=["student"],
                optimizer=rate,
                constraints=constraints or {},
            ),
        ]
    )


@pytest.mark.parametrize("constraints", [{}, {"*": "softplus"}], ids=["free", "constrained"])
@pytest.mark.parametrize("objective", [chained, nested, beside])
@pytest.mark.parametrize("method", ["finite differences", "of a solution"])
def test_parts_made_of_parts_and_history_in_common(method, objective, constraints):
    """Against the same objective written out, before and after it is known that there is something to share."""
    graph = of_finder(objective, METHODS[method], constraints=constraints)
    plain = of_finder(lambda values, batch: objective(Written(values), batch), METHODS[method], constraints=constraints)
    state = graph.init(seed=0)
    for _ in range(3):
        assert relative_error(graph.hypergradient("finder", state), plain.hypergradient("finder", state)) < 1e-8
        state, _ = graph.step(state)


@pytest.mark.parametrize("student", [{}, {"*": "softplus"}], ids=["free", "constrained"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_levels_own_variables_are_refused_wherever_they_come_in(inside, student):
    def objective(values: Any, batch: Any) -> Tensor:
        total = values["student"].sum().exp()

        def seen() -> Tensor:
            return moved(values) * (values["student"].sum().exp() if inside else total)

        x = values.shared("x", seen)
        y = values.shared("y", lambda: x * 2)
        return (y @ values["student"] - SEEN.sum(1) * total).square().mean()

    graph = of_finder(objective, FiniteDifference(), student=student)
    state = graph.init(seed=0)
    for _ in range(2):  # not known to share, and known
        with pytest.raises(mlo.UserError, match=r"by `values.shared` depends on the level's own variables"):
            graph.step(state)


def changed(values: Any) -> Tensor:
    return values.shared("x", lambda: SEEN.clone()).mul_(2)


def changed_of_finder(values: Any) -> Tensor:
    return values.shared("x", lambda: moved(values)).mul_(2)


def called_alike(values: Any) -> Tensor:
    return values.shared("x", lambda: moved(values)) + values.shared("x", lambda: SEEN)


def a_tuple(values: Any) -> Tensor:
    return values.shared("x", lambda: (moved(values), SEEN))[0]


def a_number(values: Any) -> Tensor:
    return values.shared("x", lambda: {"x": moved(values), "scale": 2.0})["x"]


MISTAKES = [
    (changed, "changed what it shares as 'x' in place"),
    (changed_of_finder, "changed what it shares as 'x' in place"),
    (called_alike, "shares two parts as 'x'"),
    (a_tuple, "shares as 'x': expected a tensor, or tensors by name, got a tuple"),
    (a_number, "shares as 'x', 'scale': expected a tensor, or tensors by name, got a float"),
]


@pytest.mark.parametrize("method", ["finite differences", "unrolled"])
@pytest.mark.parametrize(("seen", "said"), MISTAKES)
def test_what_would_differ_from_evaluation_to_evaluation_is_refused(seen, said, method):
    def objective(values: Any, batch: Any) -> Tensor:
        return (seen(values) @ values["student"] - values["finder"]["a"].sum()).square().mean()

    graph = of_finder(objective, METHODS[method])
    with pytest.raises(mlo.UserError, match=said):
        graph.step(graph.init(seed=0))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("method", [Unroll(), Neumann(terms=3, step_size=0.1)])
def test_below_a_level_that_is_itself_differentiated(method, steps):
    """A response that is recorded is pulled back towards more levels than it was taken for."""

    def graph(*, shared: bool) -> mlo.Graph:
        def fit(values: Any, batch: Any) -> Tensor:
            values = values if shared else Written(values)
            x = values.shared("x", lambda: SEEN + (SEEN @ values["finder"]).tanh() * values["top"].sum())
            return (x @ values["student"] - SEEN.sum(1)).square().mean()

        def middle(values: Any, batch: Any) -> Tensor:
            own = values["finder"].square().sum() * values["top"].square().sum()
            return (SEEN @ values["student"] - 1).tanh().square().mean() + 0.1 * own

        def top(values: Any, batch: Any) -> Tensor:
            return (SEEN @ values["student"]).square().mean() + values["finder"].sum()

        rate, below = mlo.optimizer.SGD(learning_rate=0.1), FiniteDifference(radius=1e-3)
        student, finder, upper = (normal(*size, seed=9) / 2 for size in ((INPUTS,), (INPUTS, INPUTS), (2,)))
        return mlo.Graph(
            [
                mlo.Level(
                    "student",
                    objective=fit,
                    variables=student,
                    given=["finder", "top"],
                    optimizer=rate,
                    hypergradient=below,
                    steps=steps,
                ),
                mlo.Level(
                    "finder",
                    objective=middle,
                    variables=finder,
                    given=["top"],
                    subject_to=["student"],
                    optimizer=rate,
                    hypergradient=method,
                    steps=steps,
                ),
                mlo.Level("top", objective=top, variables=upper, subject_to=["finder", "student"], optimizer=rate),
            ]
        )

    one, other = graph(shared=True), graph(shared=False)
    state = one.init(seed=0)
    for _ in range(2):
        assert relative_error(one.hypergradient("top", state), other.hypergradient("top", state)) < 1e-7
        state, _ = one.step(state)


def test_a_run_that_goes_on_elsewhere_is_the_same_bit_for_bit():
    """Where nothing is known yet of what is shared."""
    graph, other = (of_finder(beside, FiniteDifference()) for _ in range(2))
    state = graph.init(seed=0)
    for _ in range(2):
        state, _ = graph.step(state)
    again = state
    for _ in range(3):
        state, _ = graph.step(state)
        again, _ = other.step(again)
    assert torch.equal(again.values["student"], state.values["student"])
    assert all(torch.equal(again.values["finder"][name], state.values["finder"][name]) for name in "ab")


def test_inside_a_transform_each_evaluation_stands_by_itself():
    graph = of_finder(beside, FiniteDifference(radius=1e-3))
    state, _ = graph.step(graph.init(seed=0))

    def found(b: Tensor) -> Tensor:
        finder = {**state.values["finder"], "b": b}
        return graph.hypergradient("finder", replace(state, values={**state.values, "finder": finder}))["a"]

    places = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    each = torch.stack([found(b) for b in places])
    assert relative_error(torch.func.vmap(found)(places), each) < 1e-8


def test_what_was_drawn_before_does_not_change_a_part():
    seen: list[Tensor] = []

    def graph(before: int) -> mlo.Graph:
        def objective(values: Any, batch: Any) -> Tensor:
            torch.rand(before)
            seen.append(values.shared("x", lambda: torch.rand(SAMPLES, INPUTS)))
            return (seen[-1] @ values["student"] - values["finder"]["a"].sum()).square().mean()

        return of_finder(objective, FiniteDifference())

    for before in (1, 2):
        graph(before).step(graph(before).init(seed=0))
    assert len({tuple(each.flatten().tolist()) for each in seen}) == 1

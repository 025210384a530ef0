"""Nests of other shapes, and all else a level may have inside one: several levels below, decay, constraints, trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import HandUpdate, normal, optimizers, relative_error, same_bits
from nests import Nested, Steps, total_gradient
from torch import Tensor

import mlo
from mlo.hypergradient import ConjugateGradient, Exact, FiniteDifference, FirstOrder, Neumann, Unroll
from mlo.optimizer import SGD, Adam, RMSprop

PROBLEM = Nested(coupling=1.0, bend=0.3)


def hypergradient(levels: list[mlo.Level]) -> Any:
    graph = mlo.Graph(levels)
    return graph.hypergradient("z", graph.init())


# Two levels below the one in the middle, one that reads the other; a level beside, and a constant.

START = {name: 0.3 * normal(2, seed=seed) for seed, name in enumerate(("one", "two", "y", "beside", "z", "fixed"))}


def one(w: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return 0.5 * (w - (y * z).tanh()).square().sum() + 0.1 * w.pow(4).sum()


def two(w: Tensor, one: Tensor, y: Tensor, fixed: Tensor) -> Tensor:
    return 0.5 * (w - one.sin() - 0.5 * y + fixed).square().sum() + 0.1 * w.pow(4).sum()


def middle(y: Tensor, one: Tensor, two: Tensor) -> Tensor:
    return 0.5 * (y - 0.3).square().sum() + 0.4 * (one + two * y).square().sum()


def beside(w: Tensor, y: Tensor, two: Tensor) -> Tensor:
    return 0.5 * (w - y * two).square().sum() + 0.1 * (w * y).square().sum()


def top(z: Tensor, y: Tensor, one: Tensor, beside: Tensor) -> Tensor:
    return (y - 1).square().sum() + (beside * one).sum() + 0.1 * z.square().sum() + beside.sum()


def wide(method: Any, steps: int, rule: Any) -> list[mlo.Level]:
    """z > y > (two reads one), and `beside`, which is given y and two and under z."""
    reads: dict[str, tuple[Callable[..., Tensor], tuple[str, ...], tuple[str, ...]]] = {
        "one": (one, ("y", "z"), ()),
        "two": (two, ("one", "y", "fixed"), ()),
        "y": (middle, (), ("one", "two")),
        "beside": (beside, ("y", "two"), ()),
    }

    def level(name: str) -> mlo.Level:
        function, given, below = reads[name]
        return mlo.Level(
            name,
            objective=lambda values, batch: function(values[name], *(values[other] for other in (*given, *below))),
            variables=START[name],
            given=given,
            subject_to=below,
            optimizer=rule,
            steps=steps,
            hypergradient=method,
        )

    z = mlo.Level(
        "z",
        objective=lambda values, batch: top(*(values[name] for name in ("z", "y", "one", "beside"))),
        variables=START["z"],
        subject_to=("y", "one", "two", "beside"),
        optimizer=SGD(learning_rate=0.1),
    )
    return [*map(level, reads), mlo.Level("fixed", variables=START["fixed"]), z]


def wide_by_hand(steps: int, update: HandUpdate) -> Tensor:
    each, z = Steps(steps, update), START["z"].clone().requires_grad_()

    def respond(name: str, loss: Callable[[Tensor], Tensor]) -> Tensor:
        return each.taken(lambda w, _: total_gradient(loss, w), START[name])[0]

    def below(y: Tensor) -> tuple[Tensor, Tensor]:
        first = respond("one", lambda w: one(w, y, z))
        return first, respond("two", lambda w: two(w, first, y, START["fixed"]))

    y = respond("y", lambda w: middle(w, *below(w)))
    first, second = below(y)
    third = respond("beside", lambda w: beside(w, y, second))
    return torch.autograd.grad(top(z, y, first, third), z)[0]


@pytest.mark.parametrize("rule", ["momentum", "adam", "nesterov", "centered"])
@pytest.mark.parametrize("replay", [False, True])
def test_several_levels_below_and_one_beside(rule, replay):
    ours, by_hand = optimizers[rule]
    for steps in (1, 2, 3):
        levels = wide(Unroll(replay=replay), steps, ours)
        assert relative_error(hypergradient(levels), wide_by_hand(steps, by_hand)) < 1e-12
        graph = mlo.Graph(levels)
        _, metrics = graph.step(graph.init())
        assert tuple(graph.cost(1)) == (metrics.gradients, metrics.products, len(metrics.pullbacks))


def test_a_level_beside_runs_after_what_it_reads_was_taken_anew():
    graph = mlo.Graph(wide(Unroll(), 1, SGD(learning_rate=0.1)))
    assert graph.order.index("beside") > graph.order.index("y")


# Everything else a level may have.

MIXED = [  # of x, of y, their steps
    (Exact(), Exact(), (0, 0)),
    (Neumann(terms=3, step_size=0.4), ConjugateGradient(iterations=8), (1, 2)),
    (Unroll(), Unroll(), (2, 2)),
    (Unroll(replay=True), Unroll(replay=True), (2, 2)),
    (FiniteDifference(radius=1e-3), Unroll(), (1, 2)),
    (FirstOrder(), Exact(), (2, 1)),
]
mixed = pytest.mark.parametrize(("x", "y", "steps"), MIXED, ids=lambda value: type(value).__name__)


@mixed
def test_weight_decay_belongs_to_what_is_minimised(x, y, steps):
    decays = {"x": 0.3, "y": 0.5}
    rules = SGD(learning_rate=0.4, weight_decay=decays["x"]), SGD(learning_rate=0.2, weight_decay=decays["y"])
    found = hypergradient(PROBLEM.levels(x, y, steps, rules=rules))
    plain = PROBLEM.levels(x, y, steps, rules=(SGD(learning_rate=0.4), SGD(learning_rate=0.2)))

    def decayed(level: mlo.Level) -> mlo.Level:
        function, decay = level.objective, decays.get(level.name, 0.0)
        assert function is not None
        return replace(level, objective=lambda v, b: function(v, b) + 0.5 * decay * v[level.name].square().sum())

    assert relative_error(found, hypergradient(list(map(decayed, plain)))) < 1e-9


@mixed
def test_constraints_are_a_change_of_variables(x, y, steps):
    chosen = {"x": ("softplus", torch.Tensor.exp), "y": ("sigmoid", torch.Tensor.sigmoid)}
    plain = PROBLEM.levels(x, y, steps)
    constrained = [
        replace(level, variables=chosen[level.name][1](level.variables), constraints={"*": chosen[level.name][0]})
        if level.name in chosen
        else level
        for level in plain
    ]
    free = mlo.Graph(constrained).init().values

    def changed(level: mlo.Level) -> mlo.Level:
        function = level.objective
        assert function is not None

        def objective(values: Any, batch: Any) -> Any:
            softened = {"x": torch.nn.functional.softplus(values["x"]), "y": values["y"].sigmoid(), "z": values["z"]}
            return function(softened, batch)

        return replace(level, objective=objective, variables=free[level.name])

    assert relative_error(hypergradient(constrained), hypergradient(list(map(changed, plain)))) < 1e-9


@mixed
@pytest.mark.parametrize("rules", ["descent", "moments", "clipped"])
def test_several_tensors_a_level_are_one_level(x, y, steps, rules):
    """Also with a zero-dimensional one, and one that nothing reads: no effect and a zero hypergradient."""
    chosen = {
        "descent": None,
        "moments": (Adam(learning_rate=0.1), RMSprop(learning_rate=0.1, momentum=0.3)),
        "clipped": (SGD(learning_rate=0.1, clip_norm=0.05), SGD(learning_rate=0.1, clip_norm=0.05)),
    }[rules]
    x, y = (replace(method, damping=0.1) if isinstance(method, Exact) else method for method in (x, y))
    plain = PROBLEM.levels(x, y, steps, rules=chosen)

    def split(level: mlo.Level) -> mlo.Level:
        function, w = level.objective, level.variables
        assert function is not None
        assert isinstance(w, Tensor)

        def objective(values: Any, batch: Any) -> Any:
            joined = {name: torch.cat([values[name]["b"].reshape(-1), values[name]["a"]]) for name in values}
            return function(joined, batch)

        tree = {"a": w[1:].clone(), "unused": torch.ones(2), "b": w[0].clone()}
        return replace(level, objective=objective, variables=tree)

    found = hypergradient(list(map(split, plain)))
    assert not found["unused"].any()
    joined = torch.cat([found["b"].reshape(-1), found["a"]])
    assert relative_error(joined, hypergradient(plain)) < 1e-9


@pytest.mark.parametrize("rule", [Adam(learning_rate=0.1), RMSprop(learning_rate=0.1)], ids=repr)
@pytest.mark.parametrize("replay", [False, True])
def test_gradients_that_are_exactly_zero_give_finite_numbers(rule, replay):
    """√ is differentiated three times here."""
    zeros = {name: torch.zeros(2) for name in "xyz"}
    x = mlo.Level(
        "x",
        objective=lambda v, b: 0.5 * (v["x"] - v["y"] * v["z"]).square().sum(),
        variables=zeros["x"],
        given=("y", "z"),
        optimizer=rule,
        steps=2,
        hypergradient=Unroll(replay=replay),
    )
    y = mlo.Level(
        "y",
        objective=lambda v, b: 0.5 * (v["x"] + v["y"]).square().sum(),
        variables=zeros["y"],
        subject_to=("x",),
        optimizer=rule,
        steps=2,
        hypergradient=Unroll(replay=replay),
    )
    z = mlo.Level(
        "z",
        objective=lambda v, b: (v["y"] - 1).square().sum() + v["x"].sum() + v["z"].sum(),
        variables=zeros["z"],
        subject_to=("y", "x"),
        optimizer=rule,
    )
    assert torch.equal(hypergradient([x, y, z]), torch.ones(2)), "what is at rest does not move"


@mixed
def test_float32_is_float64_to_its_rounding(x, y, steps):
    plain = PROBLEM.levels(x, y, steps)

    def narrow(level: mlo.Level) -> mlo.Level:
        function, w = level.objective, level.variables
        assert function is not None
        assert isinstance(w, Tensor)

        def objective(values: Any, batch: Any) -> Any:
            return function({name: values[name].double() for name in values}, batch).float()

        return replace(level, objective=objective, variables=w.float())

    found = hypergradient(list(map(narrow, plain)))
    assert found.dtype == torch.float32
    allowed = 1e-2 if isinstance(x, FiniteDifference) else 1e-5  # a radius of 1e-3 drowns in the rounding
    assert relative_error(found.double(), hypergradient(plain)) < allowed


@pytest.mark.parametrize("steps", [(1, 1), (2, 3)])
def test_an_opponent_of_a_lower_level_is_seen_where_the_iteration_began(steps):
    """The same bits as with a constant in its place."""
    x, y, z = PROBLEM.levels(Unroll(), Unroll(), steps)
    plain = x.objective
    assert plain is not None

    def disturbed(values: Any, batch: Any) -> Any:
        return plain(values, batch) + 0.3 * (values["x"] * values["rival"]).square().sum()

    begun = 0.7 * normal(3, seed=30)
    rival = mlo.Level(
        "rival",
        objective=lambda values, batch: (values["rival"] + values["x"]).square().sum(),
        variables=begun,
        against=("x",),
        optimizer=SGD(learning_rate=0.1),
    )
    game = mlo.Graph([replace(x, objective=disturbed, against=("rival",)), y, z, rival])
    still = mlo.Graph(
        [replace(x, objective=disturbed, given=(*x.given, "rival")), y, z, mlo.Level("rival", variables=begun)]
    )
    assert same_bits(game.hypergradient("z", game.init()), still.hypergradient("z", still.init()))
    played, _ = game.step(game.init())
    alone, _ = still.step(still.init())
    assert all(same_bits(played.values[name], alone.values[name]) for name in "xyz")
    assert not same_bits(played.values["rival"], begun)

"""What a second reading of nests, games and the new methods found: each of these fails until it is mended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import normal
from nests import Nested
from torch import Tensor

import mlo
from mlo import _structure
from mlo.hypergradient import (
    ConjugateGradient,
    Equilibrium,
    Exact,
    Forward,
    Neumann,
    Preconditioned,
    Unroll,
    ZerothOrder,
)
from mlo.optimizer import SGD, Read

F64 = torch.float64
PROBLEM = Nested(coupling=1.0, bend=0.3)


def level(name: str, objective: Callable[[Any], Tensor], **fields: Any) -> mlo.Level:
    fields = {"variables": torch.full((2,), 0.5, dtype=F64), "optimizer": SGD(learning_rate=0.1), **fields}
    return mlo.Level(name, objective=lambda values, batch: objective(values), **fields)


def test_a_game_whose_players_do_not_all_meet_is_one_game():
    """p – q – r: p and r play against q alone."""
    rivals = {"p": "q", "q": "pr", "r": "q"}
    pairs = {a + b: 0.2 * normal(2, 2, seed=10 * i + j) for i, a in enumerate("pqr") for j, b in enumerate("pqr")}
    own = {name: normal(2, 2, seed=50 + i) for i, name in enumerate("pqr")}

    def loss(name: str, w: Any, z: Tensor) -> Tensor:
        met = sum((w[name] @ pairs[name + other] @ w[other] for other in rivals[name]), torch.zeros((), dtype=F64))
        return 0.6 * w[name] @ w[name] - w[name] @ own[name] @ z + met

    players = [
        level(
            name,
            lambda values, name=name: loss(name, values, values["z"]),
            given=("z",),
            against=tuple(rivals[name]),
            steps=0,
            hypergradient=Equilibrium(inverse=Exact()),
        )
        for name in "pqr"
    ]
    top = level(
        "z", lambda v: sum((v[n] - 1).square().sum() * (i + 1) for i, n in enumerate("pqr")), subject_to=tuple("pqr")
    )
    z = torch.tensor([0.5, -0.3], dtype=F64)

    def joint(w: Tensor, z: Tensor) -> Tensor:
        parts = dict(zip("pqr", w.split(2), strict=True))
        grads = [torch.func.grad(lambda a, n=n: loss(n, {**parts, n: a}, z))(parts[n]) for n in "pqr"]
        return torch.cat(grads)

    zero = torch.zeros(6, dtype=F64)
    jacobian, cross = torch.func.jacrev(joint, (0, 1))(zero, z)
    solved = torch.linalg.solve(jacobian, -joint(zero, z))
    cotangent = 2 * (solved - 1) * torch.tensor([1.0, 1, 2, 2, 3, 3], dtype=F64)
    expected = -cross.T @ torch.linalg.solve(jacobian.T, cotangent)
    try:
        graph = mlo.Graph([*players, top])
    except mlo.GraphError:
        return  # to refuse it is an answer as well
    found = graph.hypergradient("z", graph.init(values={**dict(zip("pqr", solved.split(2), strict=True)), "z": z}))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_game_takes_no_inverse_that_it_cannot_have():
    """An AssertionError is no answer."""

    def graph() -> mlo.Graph:
        p = level(
            "p", lambda v: (v["p"] - v["z"]).square().sum() + v["p"] @ v["q"], given=("z",), against=("q",), **game
        )
        q = level(
            "q", lambda v: (v["q"] + v["z"]).square().sum() - v["p"] @ v["q"], given=("z",), against=("p",), **game
        )
        return mlo.Graph([p, q, level("z", lambda v: v["p"].sum() + v["q"].sum(), subject_to=("p", "q"))])

    try:
        game: dict[str, Any] = {"hypergradient": Equilibrium(inverse=Preconditioned())}
        nest = graph()
    except (ValueError, mlo.UserError):
        return
    assert nest.hypergradient("z", nest.init()).isfinite().all()


def test_a_player_may_reach_the_upper_level_through_its_opponent_alone():
    game: dict[str, Any] = {"hypergradient": Equilibrium(inverse=Exact()), "steps": 200}
    p = level("p", lambda v: (v["p"] - v["z"]).square().sum() + v["p"] @ v["q"], given=("z",), against=("q",), **game)
    q = level("q", lambda v: v["q"].square().sum() - v["p"] @ v["q"], against=("p",), **game)
    graph = mlo.Graph([p, q, level("z", lambda v: v["q"].sum(), subject_to=("p", "q"))])
    state = graph.init()
    graph.probe(state)  # 2(p − z) + q = 0 and 2q − p = 0: q = 0.4 z
    torch.testing.assert_close(graph.hypergradient("z", state), torch.full((2,), 0.4, dtype=F64))


def test_a_game_leaves_nothing_out_and_says_so():
    p = level("p", lambda v: v["p"].sum(), given=("z",), against=("q",), hypergradient=Equilibrium())
    q = level("q", lambda v: v["q"].sum(), given=("z",), against=("p",), hypergradient=Equilibrium())
    z = level("z", lambda v: v["p"].sum(), subject_to=("p", "q"))
    assert _structure.held_fixed(z, {each.name: each for each in (p, q, z)}) == ()


@pytest.mark.parametrize("methods", [(Exact(), Unroll()), (Unroll(replay=True), Unroll(replay=True))], ids=str)
def test_a_state_that_requires_gradients_is_the_same_state(methods):
    graph = mlo.Graph(PROBLEM.levels(*methods, (2, 2)))
    state = graph.init()
    tracked = replace(state, values={name: tensor.clone().requires_grad_() for name, tensor in state.values.items()})
    torch.testing.assert_close(graph.hypergradient("z", tracked), graph.hypergradient("z", state), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [Exact(), Unroll()], ids=str)
def test_a_decay_read_from_two_levels_above_is_not_left_out(method):
    """x* = 2(y + 1)/(2 + z), y* = (1 − a²)/(1 + a²) with a = 2/(2 + z)."""
    x = level(
        "x",
        lambda v: (v["x"] - v["y"] - 1).square().sum(),
        given=("y", "z"),
        optimizer=SGD(learning_rate=0.3, weight_decay=Read("z")),
        steps=60,
        hypergradient=method,
    )
    y = level("y", lambda v: (v["y"] - 1).square().sum() + v["x"].square().sum(), subject_to=("x",), steps=60)
    top = level("z", lambda v: (v["y"] - 2).square().sum(), subject_to=("y",), variables=torch.tensor(0.2, dtype=F64))
    z = torch.tensor(0.2, dtype=F64, requires_grad=True)
    square = (2 / (2 + z)) ** 2
    (expected,) = torch.autograd.grad(2 * ((1 - square) / (1 + square) - 2) ** 2, z)
    try:
        graph = mlo.Graph([x, y, top])
    except mlo.GraphError:
        return
    torch.testing.assert_close(graph.hypergradient("z", graph.init()), expected, rtol=1e-5, atol=0)


def test_forward_in_the_middle_with_direct_is_unroll_or_is_refused():
    def hypergradient(method: Any) -> Tensor:
        x = level("x", lambda v: (v["x"] - 2 * v["y"]).square().sum(), given=("y",), steps=3)
        y = level(
            "y",
            lambda v: 0.5 * (v["y"] - v["z"]).square().sum() + 0.2 * (v["x"] * v["y"]).square().sum(),
            given=("z",),
            subject_to=("x",),
            steps=3,
            hypergradient=method,
            nested="direct",
        )
        graph = mlo.Graph([x, y, level("z", lambda v: (v["y"] - 1).square().sum(), subject_to=("y",))])
        return graph.hypergradient("z", graph.init())

    expected = hypergradient(Unroll())
    try:
        found = hypergradient(Forward())
    except mlo.GraphError:
        return
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "method",
    [Neumann(terms=3, step_size="auto"), ConjugateGradient(iterations=2, warm_start=True)],
    ids=["neumann", "conjugate_gradient"],
)
def test_what_is_remembered_in_a_nest_does_not_tell_a_replay_from_a_record(method):
    recorded = mlo.Graph(PROBLEM.levels(method, Unroll(), (4, 3)))
    replayed = mlo.Graph(PROBLEM.levels(method, Unroll(replay=True), (4, 3)))
    state, _ = recorded.step(recorded.init())
    torch.testing.assert_close(
        replayed.hypergradient("z", state), recorded.hypergradient("z", state), rtol=1e-10, atol=0
    )


def test_opponents_below_a_nest_have_the_buffers_they_began_with():
    data = normal(8, 2, seed=1)

    def graph(*, nested: bool) -> mlo.Graph:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).double()
        p = level(
            "p", lambda v: (v["p"](data) - v["y"]).square().mean(), variables=net, given=("y",), against=("q",), steps=2
        )
        q = level(
            "q",
            lambda v: (v["p"](data, training=False) - v["q"] - v["y"]).square().mean(),
            given=("y",),
            against=("p",),
            steps=2,
        )
        y = level(
            "y",
            lambda v: (
                v["p"](data, training=False).square().mean()
                + v["q"].square().sum()
                + (v["y"] @ v["z"] if nested else 0)
            ),
            subject_to=("p", "q"),
            given=("z",) if nested else (),
        )
        z = level("z", lambda v: v["y"].square().sum(), subject_to=("y",), variables=torch.zeros(2, dtype=F64))
        return mlo.Graph([p, q, y, z] if nested else [p, q, y])

    values = []
    for nested in (False, True):
        each = graph(nested=nested)
        values.append(each.step(each.init())[0].values["y"])
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)


def test_the_lowest_of_four_levels_may_read_the_uppermost():
    graph = mlo.Graph(
        [
            level("x", lambda v: (v["x"] - v["y"] * v["t"]).square().sum(), given=("y", "t")),
            level(
                "y", lambda v: (v["y"] - v["z"]).square().sum() + v["x"].square().sum(), given=("z",), subject_to=("x",)
            ),
            level("z", lambda v: (v["z"] - 1).square().sum() + v["y"].square().sum(), subject_to=("y",)),
            level("t", lambda v: (v["z"] - 2).square().sum(), subject_to=("z",)),
        ]
    )
    assert graph.step(graph.init())[0].values["t"].isfinite().all()


def test_responses_that_depend_on_each_other_through_a_nest_are_a_mistake_with_a_name():
    """y depends on w because x reads it, and w on y."""
    levels = [
        level("x", lambda v: (v["x"] - v["y"] - v["w"]).square().sum(), given=("y", "w")),
        level("y", lambda v: (v["y"] - 1).square().sum() + v["x"].square().sum(), subject_to=("x",)),
        level("w", lambda v: (v["w"] - v["y"] * v["z"]).square().sum(), given=("y", "z")),
        level("z", lambda v: (v["y"] - 2).square().sum() + v["w"] @ v["x"], subject_to=("y", "x", "w")),
    ]
    with pytest.raises(mlo.GraphError):
        mlo.Graph(levels)


def test_an_upper_level_that_runs_before_a_nest_differentiates_what_it_saw():
    """u is above x, and runs before y, which is too, because x reads m and m reads u."""
    graph = mlo.Graph(
        [
            level("x", lambda v: (v["x"] - v["y"] - v["m"] - v["u"]).square().sum(), given=("y", "m", "u")),
            level("m", lambda v: (v["m"] - v["u"]).square().sum(), given=("u",)),
            level("u", lambda v: v["x"].square().sum() + v["u"].square().sum(), subject_to=("x",)),
            level(
                "y", lambda v: (v["y"] - v["z"]).square().sum() + v["x"].square().sum(), given=("z",), subject_to=("x",)
            ),
            level("z", lambda v: v["y"].square().sum(), subject_to=("y",)),
        ]
    )
    assert graph.step(graph.init())[0].values["u"].isfinite().all()


@pytest.mark.parametrize("method", [Forward(), ZerothOrder()], ids=["forward", "zeroth_order"])
def test_the_cost_of_two_upper_levels_that_are_due_together_is_known(method):
    graph = mlo.Graph(
        [
            level(
                "x",
                lambda v: (v["x"] - v["z"] - v["u"]).square().sum(),
                given=("z", "u"),
                steps=3,
                hypergradient=method,
            ),
            level("z", lambda v: v["x"].square().sum(), subject_to=("x",)),
            level("u", lambda v: v["x"].square().sum(), subject_to=("x",)),
        ]
    )
    _, metrics = graph.step(graph.init())
    assert graph.cost(1) == (metrics.gradients, metrics.products, len(metrics.pullbacks))


def test_a_few_directions_are_the_same_with_another_upper_level_beside():
    """What a step follows is what `Graph.hypergradient` gives."""
    graph = mlo.Graph(
        [
            level(
                "x",
                lambda v: (v["x"] - v["z"] - v["u"]).square().sum(),
                given=("z", "u"),
                steps=3,
                hypergradient=ZerothOrder(samples=1),
            ),
            level("z", lambda v: v["x"].square().sum(), subject_to=("x",)),
            level("u", lambda v: v["x"].square().sum(), subject_to=("x",)),
        ]
    )
    state = graph.init()
    moved = (state.values["z"] - graph.step(state)[0].values["z"]) / 0.1
    torch.testing.assert_close(moved, graph.hypergradient("z", state))


@pytest.mark.parametrize("nested", ["direct", "reduced"])
def test_pullbacks_are_counted_once_where_responses_in_the_middle_are_compared(nested):
    graph = mlo.Graph(PROBLEM.levels(Exact(), ZerothOrder(), (2, 2), nested=nested))
    _, metrics = graph.step(graph.init())
    assert graph.cost(1).pullbacks == len(metrics.pullbacks)


def test_the_cost_of_looking_ahead_without_the_nest_is_known():
    """z is above y above x and u above x; where u alone is due, x is taken anew for it."""
    graph = mlo.Graph(
        [
            level("x", lambda v: (v["x"] - v["y"] - v["u"]).square().sum(), given=("y", "u")),
            level(
                "y",
                lambda v: (v["y"] - v["z"]).square().sum() + v["x"].square().sum(),
                given=("z",),
                subject_to=("x",),
                every=2,
            ),
            level("z", lambda v: v["y"].square().sum(), subject_to=("y",), every=2, lookahead=True),
            level("u", lambda v: v["x"].square().sum(), subject_to=("x",), lookahead=True),
        ]
    )
    state, gradients = graph.init(), 0
    for _ in range(3):
        state, metrics = graph.step(state)
        gradients += metrics.gradients
    assert graph.cost(3).gradients == gradients

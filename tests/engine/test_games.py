"""Players that play against each other, differentiated together at their equilibrium."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import normal, relative_error
from torch import Tensor

import mlo
from mlo.hypergradient import (
    GMRES,
    CentralDifference,
    ConjugateGradient,
    Equilibrium,
    Exact,
    FirstOrder,
    Implicit,
    Neumann,
    Unroll,
)
from mlo.optimizer import SGD

A = 0.5 * torch.eye(3, dtype=torch.float64) + 0.1
B, P, Q = normal(3, 2, seed=1), normal(3, 2, seed=2), normal(2, 2, seed=3)
TARGET, START = normal(3, seed=4), torch.tensor([0.3, -0.2], dtype=torch.float64)


def of_g(g: Tensor, d: Tensor, u: Tensor) -> Tensor:
    return 0.5 * g @ A @ g + g @ B @ d - g @ P @ u + 0.1 * g.pow(4).sum()


def of_d(d: Tensor, g: Tensor, u: Tensor) -> Tensor:
    return 0.35 * d @ d - g @ B @ d - d @ Q @ u + 0.1 * d.cosh().sum() * u.sum()


def of_u(g: Tensor, d: Tensor, u: Tensor) -> Tensor:
    return 0.5 * (g - TARGET).square().sum() + d.sum().square() + 0.05 * u.square().sum()


def joint(v: Tensor, u: Tensor) -> Tensor:
    """The gradients of both players, side by side."""
    g, d = v[:3], v[3:]
    return torch.cat([torch.func.grad(of_g)(g, d, u), torch.func.grad(of_d)(d, g, u)])


def solved(u: Tensor, decay: float = 0.0) -> Tensor:
    """The equilibrium, by Newton's method."""
    v = torch.zeros(5, dtype=torch.float64)
    for _ in range(40):
        jacobian = torch.func.jacrev(joint)(v, u) + decay * torch.eye(5, dtype=torch.float64)
        v = v - torch.linalg.solve(jacobian, joint(v, u) + decay * v)
    assert (joint(v, u) + decay * v).norm() < 1e-12
    return v


def dense(u: Tensor, decay: float = 0.0) -> Tensor:
    """The hypergradient by the implicit function theorem, with whole matrices."""
    v = solved(u, decay)
    jacobian = torch.func.jacrev(joint)(v, u) + decay * torch.eye(5, dtype=torch.float64)
    assert (jacobian - jacobian.T).norm() > 1, "a game, not an optimum"
    cotangent, direct = torch.func.grad(lambda v, u: of_u(v[:3], v[3:], u), (0, 1))(v, u)
    return direct - torch.func.jacrev(joint, 1)(v, u).T @ torch.linalg.solve(jacobian.T, cotangent)


def levels(method: Any, *, steps: int = 0, decay: float = 0.0) -> list[mlo.Level]:
    v, rule = solved(START, decay), SGD(learning_rate=0.05, weight_decay=decay)
    return [
        mlo.Level(
            "g",
            objective=lambda values, _: of_g(values["g"]["a"], values["d"], values["u"]),
            variables={"a": v[:3]},
            given=("u",),
            against=("d",),
            optimizer=rule,
            steps=steps,
            hypergradient=method,
        ),
        mlo.Level(
            "d",
            objective=lambda values, _: of_d(values["d"], values["g"]["a"], values["u"]),
            variables=v[3:],
            given=("u",),
            against=("g",),
            optimizer=rule,
            steps=steps,
            hypergradient=method,
        ),
        mlo.Level(
            "u",
            objective=lambda values, _: of_u(values["g"]["a"], values["d"], values["u"]),
            variables=START,
            subject_to=("g", "d"),
            optimizer=rule,
        ),
    ]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("method", "allowed"),
    [
        (Equilibrium(), 1e-10),
        (Equilibrium(inverse=Exact()), 1e-10),
        (Equilibrium(inverse=GMRES(iterations=5)), 1e-10),
        (Equilibrium(inverse=Neumann(terms=4000, step_size=0.1)), 1e-10),
        (Equilibrium(cross=CentralDifference(radius=1e-4)), 1e-7),
    ],
    ids=str,
)
def test_at_the_equilibrium_the_hypergradient_is_that_of_the_implicit_function_theorem(method, allowed, decay, steps):
    graph = mlo.Graph(levels(method, steps=steps, decay=decay))
    found = graph.hypergradient("u", graph.init())
    assert relative_error(found, dense(START, decay)) <= allowed


def test_it_is_the_slope_of_the_game_solved_anew():
    step, found = 1e-5, dense(START)
    for index, direction in enumerate(torch.eye(2, dtype=torch.float64)):
        ends = [solved(START + sign * step * direction) for sign in (1, -1)]
        sides = [of_u(v[:3], v[3:], START + sign * step * direction) for v, sign in zip(ends, (1, -1), strict=True)]
        assert abs((sides[0] - sides[1]) / (2 * step) - found[index]) <= 1e-7


def test_each_player_by_itself_is_another_answer():
    """What was meant by `against` before, and is still what other methods do: no response along it."""
    graph = mlo.Graph(levels(Exact()))
    assert relative_error(graph.hypergradient("u", graph.init()), dense(START)) > 0.1


def test_a_level_that_plays_against_nobody_is_a_game_of_one():
    def graph(method: Any) -> mlo.Graph:
        one, _, upper = levels(method)
        one = replace(one, against=(), objective=lambda values, _: of_g(values["g"]["a"], B[0], values["u"]))
        return mlo.Graph(
            [one, replace(upper, subject_to=("g",), objective=lambda values, _: values["g"]["a"].pow(3).sum())]
        )

    one, other = graph(Equilibrium()), graph(Exact())
    right = other.hypergradient("u", other.init())
    assert relative_error(one.hypergradient("u", one.init()), right) <= 1e-12


def test_what_it_costs_is_counted_and_predicted():
    graph = mlo.Graph(levels(Equilibrium(inverse=GMRES(iterations=3, tolerance=0.0)), steps=2))
    _, metrics = graph.step(graph.init())
    assert tuple(graph.cost(1)) == (metrics.gradients, metrics.products, len(metrics.pullbacks))
    assert metrics.pullbacks == (("u", "d"), ("u", "g"))
    assert set(metrics.norms["u"].through) == {"d+g"}
    assert metrics.reports["u", "g"]["residual"] < 1


def test_the_order_of_declaration_changes_nothing():
    one, other = mlo.Graph(levels(Equilibrium())), mlo.Graph(levels(Equilibrium())[::-1])
    assert torch.equal(one.hypergradient("u", one.init()), other.hypergradient("u", other.init()))


def test_a_third_level_reads_the_game():
    """w = (g, d) M: what arrives at the players comes from u's objective and from w."""
    mixing = normal(5, 2, seed=7)
    g, d, upper = levels(Equilibrium())
    third = mlo.Level(
        "w",
        objective=lambda values, _: (
            0.5 * (values["w"] - torch.cat([values["g"]["a"], values["d"]]) @ mixing).square().sum()
        ),
        variables=solved(START) @ mixing,
        given=("g", "d"),
        optimizer=SGD(learning_rate=0.1),
        steps=0,
        hypergradient=Exact(),
    )
    upper = replace(
        upper, subject_to=("w", "g", "d"), objective=lambda values, _: values["w"].pow(3).sum() + values["d"].sum()
    )
    graph = mlo.Graph([g, d, third, upper])
    found = graph.hypergradient("u", graph.init())
    v = solved(START)
    cotangent = torch.func.grad(lambda v: (v @ mixing).pow(3).sum() + v[3:].sum())(v)
    jacobian = torch.func.jacrev(joint)(v, START)
    right = -torch.func.jacrev(joint, 1)(v, START).T @ torch.linalg.solve(jacobian.T, cotangent)
    assert relative_error(found, right) <= 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g, d, u: [g, d, replace(u, subject_to=("g",), given=("d",))],
            "level 'u', subject_to: 'g' is differentiated with its opponents, and 'd' is not listed",
        ),
        (
            lambda g, d, u: [g, replace(d, hypergradient=Unroll()), u],
            "level 'g', hypergradient: it is differentiated together with 'd', which has another method",
        ),
    ],
)
def test_half_a_game_is_refused(change, message):
    with pytest.raises(mlo.GraphError, match=re.escape(message)):
        mlo.Graph(change(*levels(Equilibrium())))


def test_an_inverse_that_needs_symmetry_is_refused():
    with pytest.raises(ValueError, match="ConjugateGradient needs a symmetric matrix"):
        Equilibrium(inverse=ConjugateGradient(iterations=5))


def test_minimal_residuals_take_an_indefinite_hessian():
    """H = diag(1, −2, 3): conjugate gradients stop at negative curvature, minimal residuals do not."""
    h = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def graph(method: Any) -> mlo.Graph:
        return mlo.Graph(
            [
                mlo.Level(
                    "w",
                    objective=lambda values, _: (0.5 * h * values["w"].square() - values["w"] * values["u"]).sum(),
                    variables=torch.ones(3, dtype=torch.float64),
                    given=("u",),
                    optimizer=SGD(learning_rate=0.1),
                    steps=0,
                    hypergradient=method,
                ),
                mlo.Level(
                    "u",
                    objective=lambda values, _: (values["w"] * torch.arange(1.0, 4.0)).sum(),
                    variables=torch.ones(3, dtype=torch.float64),
                    subject_to=("w",),
                    optimizer=SGD(learning_rate=0.1),
                ),
            ]
        )

    right = torch.arange(1.0, 4.0, dtype=torch.float64) / h
    found = graph(GMRES(iterations=3))
    assert relative_error(found.hypergradient("u", found.init()), right) <= 1e-12
    worse = graph(Implicit(inverse=FirstOrder()))
    assert relative_error(worse.hypergradient("u", worse.init()), right) > 0.5


def test_minimal_residuals_take_no_direction_out_of_rounding():
    """One number is read and two are not: the second vector of a space of one must not be noise, wherever it starts."""

    def graph(method: Any) -> mlo.Graph:
        start = {"read": torch.tensor(1.0, dtype=torch.float64), "unused": torch.zeros(2, dtype=torch.float64)}
        rule = SGD(learning_rate=0.1)
        return mlo.Graph(
            [
                mlo.Level(
                    "w",
                    objective=lambda values, _: (values["w"]["read"] - values["u"]).cosh() + values["w"]["read"].pow(4),
                    variables=start,
                    given=("u",),
                    optimizer=rule,
                    steps=0,
                    hypergradient=method,
                ),
                mlo.Level(
                    "u",
                    objective=lambda values, _: values["w"]["read"].pow(3),
                    variables=torch.tensor(0.7, dtype=torch.float64),
                    subject_to=("w",),
                    optimizer=rule,
                ),
            ]
        )

    once, again = graph(GMRES(iterations=1)), graph(GMRES(iterations=3, tolerance=0.0))
    for number in normal(200, seed=11):
        at = {"w": {"read": number, "unused": torch.zeros(2, dtype=torch.float64)}}
        right = once.hypergradient("u", once.init(values=at))
        assert relative_error(again.hypergradient("u", again.init(values=at)), right) <= 1e-12, number

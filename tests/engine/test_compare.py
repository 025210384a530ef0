"""What a method reports for products of its own: the cosine with first order, and λ_max beside a given step size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from quadratics import DESCENT, Quadratics

import mlo
from mlo.hypergradient import (
    GMRES,
    CentralDifference,
    ConjugateGradient,
    Exact,
    FirstOrder,
    Implicit,
    Neumann,
    Nystrom,
    Preconditioned,
)

METHODS = [
    Neumann(terms=9, step_size=0.7, compare="first_order"),
    Neumann(terms=9, step_size="auto", compare="first_order"),
    ConjugateGradient(iterations=12, compare="first_order"),
    GMRES(iterations=12, compare="first_order"),
    Nystrom(rank=3, damping=0.1, compare="first_order"),
    Exact(compare="first_order"),
    Preconditioned(compare="first_order"),
    Implicit(inverse=Exact(compare="first_order"), cross=CentralDifference()),
]


def without(method: Any) -> Any:
    if isinstance(method, Implicit):
        return replace(method, inverse=replace(method.inverse, compare=None))
    return replace(method, compare=None)


def parts(problem: Quadratics, method: Any) -> torch.Tensor:
    graph = mlo.Graph(problem.levels(method, 2, DESCENT))
    found = graph.parts("u", graph.init()).indirect
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_cosine_is_that_of_the_two_hypergradients_and_costs_one_cross_product(method: Any) -> None:
    problem = Quadratics("two", condition=30.0, seed=1)
    cross = FirstOrder() if not isinstance(method, Implicit) else replace(method, inverse=FirstOrder())
    right = torch.cosine_similarity(parts(problem, without(method)), parts(problem, cross), dim=0)
    graph, plain = (mlo.Graph(problem.levels(each, 2, DESCENT)) for each in (method, without(method)))
    assert torch.equal(parts(problem, method), parts(problem, without(method)))
    _, metrics = graph.step(graph.init())
    _, before = plain.step(plain.init())
    found = metrics.reports["u", "a"]["first_order_cosine"]
    assert found.item() == pytest.approx(right.item(), abs=1e-6 if isinstance(method, Implicit) else 1e-12)
    assert "first_order_cosine" not in before.reports.get(("u", "a"), {})
    more = (2, 0) if isinstance(method, Implicit) else (0, 1)
    assert (metrics.gradients - before.gradients, metrics.products - before.products) == more
    predicted, predicted_before = graph.cost(1), plain.cost(1)
    assert tuple(one - other for one, other in zip(predicted, predicted_before, strict=True)) == (*more, 0)


def test_first_order_compared_with_itself_is_one_and_a_zero_cotangent_zero() -> None:
    problem = Quadratics("two", condition=10.0, seed=2)
    method = Neumann(terms=0, step_size=0.3, compare="first_order")
    graph = mlo.Graph(problem.levels(method, 2, DESCENT))
    assert graph.step(graph.init())[1].reports["u", "a"]["first_order_cosine"].item() == pytest.approx(1.0, abs=1e-12)
    levels = [replace(level, objective=still) if level.name == "u" else level for level in graph.levels.values()]
    graph = mlo.Graph(levels)
    assert graph.step(graph.init())[1].reports["u", "a"]["first_order_cosine"] == 0


def still(values: Any, batch: Any) -> torch.Tensor:
    return 0 * values["a"].sum() + values["u"].square().sum()


def test_in_a_nest_the_cosine_is_counted_too() -> None:
    def low(values: Any, batch: Any) -> torch.Tensor:
        return (values["low"] - values["middle"] * values["u"]).square().sum() + values["low"].cosh().sum()

    def middle(values: Any, batch: Any) -> torch.Tensor:
        return (values["middle"] - values["low"]).square().sum() + (values["middle"] - values["u"]).cosh().sum()

    def top(values: Any, batch: Any) -> torch.Tensor:
        return (values["middle"] - 1).square().sum()

    def graph(compare: Any) -> mlo.Graph:
        start, method = torch.linspace(0.1, 0.5, 3), Neumann(terms=2, step_size=0.2, compare=compare)
        rest: dict[str, Any] = {"variables": start, "optimizer": DESCENT, "hypergradient": method}
        return mlo.Graph([
            mlo.Level("low", objective=low, given=("middle", "u"), **rest),
            mlo.Level("middle", objective=middle, given=("u",), subject_to=("low",), **rest),
            mlo.Level("u", objective=top, subject_to=("middle",), **rest),
        ])  # fmt: skip

    plain, compared = graph(None), graph("first_order")
    assert torch.equal(plain.hypergradient("u", plain.init()), compared.hypergradient("u", compared.init()))
    _, metrics = compared.step(compared.init())
    assert tuple(compared.cost(1)[:2]) == (metrics.gradients, metrics.products)
    assert 0 < metrics.reports["u", "middle"]["first_order_cosine"] < 1


def test_the_curvature_is_measured_beside_a_given_step_size_and_changes_nothing_else() -> None:
    """Power iterations from a random direction, one more an iteration of the graph: they reach λ_max = 1."""
    problem = Quadratics("two", condition=100.0, seed=3)
    plain = Neumann(terms=2, step_size=0.01)
    graph, other = (
        mlo.Graph(problem.levels(each, 1, DESCENT)) for each in (replace(plain, measure_curvature=True), plain)
    )
    state, same = graph.init(), other.init()
    found = []
    for _ in range(30):
        assert torch.equal(graph.hypergradient("u", state), other.hypergradient("u", same))
        (state, metrics), (same, before) = graph.step(state), other.step(same)
        found.append((metrics.reports["u", "a"]["lambda_max"].item(), metrics.products - before.products))
    assert [more for _, more in found] == [8] + [1] * 29
    assert found[0][0] > 0.5
    assert found[-1][0] == pytest.approx(1.0, abs=1e-3)
    assert metrics.reports["u", "a"]["step_size"] == 0.01
    assert graph.cost(1).products - other.cost(1).products == 8

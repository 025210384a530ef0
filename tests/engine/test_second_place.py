"""Evaluations of one step at several places do not see what an objective left behind in another of them."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import normal, relative_error
from torch import Tensor

import mlo
from mlo.hypergradient import CentralDifference, FiniteDifference, FirstOrder, Implicit, Unroll
from mlo.optimizer import SGD

X, Y = normal(6, 3, seed=0), normal(6, seed=1)


def fit(u: Tensor, values: Any) -> Tensor:
    return (u.sigmoid() * ((X @ values["w"]).tanh() - Y).square()).mean()


def hooked(values: Any, batch: Any) -> Tensor:
    u = values["u"]
    if u.requires_grad:
        u.register_hook(lambda gradient: -gradient)
    return fit(u, values)


def summed_up(values: Any, batch: Any) -> Tensor:
    """What stands in `.grad` is a constant, cos u, only if there was none before."""
    u = values["u"]
    slope = u.detach().cos()
    if u.requires_grad:
        u.sin().sum().backward(inputs=[u])
        slope = u.grad.detach().clone()
    return fit(u, values) + (u * slope * values["w"].sum()).mean()


def part_hooked(values: Any, batch: Any) -> Tensor:
    u = values["u"]
    part = values.shared("part", lambda: u.sin())
    if part.requires_grad:
        part.register_hook(lambda gradient: -gradient)
    return fit(part, values)


def shared_and_hooked(values: Any, batch: Any) -> Tensor:
    """The levels around it hold hooks of the evaluation that computed the part, and of those that only read."""
    u = values["u"]
    if u.requires_grad:
        u.register_hook(lambda gradient: -gradient)
    part = values.shared("part", lambda: u.sin())
    return fit(part + 0.3 * u, values)


def parts_of_parts(values: Any, batch: Any) -> Tensor:
    one = values.shared("one", lambda: {"a": values["u"].sin(), "b": X})
    if one["a"].requires_grad:
        one["a"].register_hook(lambda gradient: -gradient)
    two = values.shared("two", lambda: one["a"].exp())
    return fit(one["a"] + two, values)


OBJECTIVES = [hooked, summed_up, part_hooked, shared_and_hooked, parts_of_parts]


def hypergradient(objective: Any, method: Any) -> Tensor:
    lower = mlo.Level("w", objective=objective, variables=normal(3, seed=2), given=["u"],
                      optimizer=SGD(learning_rate=0.1), hypergradient=method)  # fmt: skip
    upper = mlo.Level("u", objective=lambda values, batch: (values["w"] - 1).square().sum(), variables=normal(6, seed=3),
                      subject_to=["w"], optimizer=SGD(learning_rate=0.1))  # fmt: skip
    graph = mlo.Graph([lower, upper])
    graph.hypergradient("u", graph.init())  # from now on it is known what is shared
    found = graph.hypergradient("u", graph.init())
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_central_differences_of_a_step_are_its_derivative(objective):
    right = hypergradient(objective, Unroll())
    assert relative_error(hypergradient(objective, FiniteDifference(radius=1e-4)), right) < 1e-6
    assert relative_error(hypergradient(objective, Unroll(replay=True)), right) < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_central_differences_across_are_the_exact_product(objective):
    right = hypergradient(objective, FirstOrder())
    found = hypergradient(objective, Implicit(inverse=FirstOrder(), cross=CentralDifference(radius=1e-4)))
    assert relative_error(found, right) < 1e-6

"""Central differences along the cotangent itself, and along what the optimizer makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal, relative_error
from torch import Tensor

import mlo
from mlo import _tree
from mlo._autodiff import difference_of_gradients, gradients
from mlo._engine import Iteration
from mlo._step import Step
from mlo.hypergradient import CentralDifference, FiniteDifference, Implicit, Neumann, Unroll
from mlo.optimizer import SGD, Adam
from mlo.schedule import Cosine

SGDS = [
    SGD(learning_rate=0.1),
    SGD(learning_rate=0.1, momentum=0.9),
    SGD(learning_rate=0.1, momentum=0.9, dampening=0.4, weight_decay=0.2),
    SGD(learning_rate=0.1, momentum=0.9, nesterov=True),
    SGD(learning_rate=Cosine(start=0.1, over=9)),
]


def graph_of(
    method: Any, optimizer: Any, *, steps: int = 3, factor: float = 1.0, dtype: Any = torch.float64
) -> mlo.Graph:
    x, y, start, u = (normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate([(6, 3), (6,), (3,), (6,)]))

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["u"].sigmoid() * ((x @ values["w"]).tanh() - y).square()).mean()

    def outer(values: Any, batch: Any) -> Tensor:
        return factor * ((x @ values["w"]).sin() - 1).square().mean()

    w = mlo.Level(
        "w", objective=inner, variables=start, given=["u"], optimizer=optimizer, steps=steps, hypergradient=method
    )
    return mlo.Graph(
        [w, mlo.Level("u", objective=outer, variables=u, subject_to=["w"], optimizer=SGD(learning_rate=0.1))]
    )


@pytest.mark.parametrize("optimizer", SGDS, ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_along_the_cotangent_or_along_its_multiple(optimizer, steps, monkeypatch):
    graph = graph_of(FiniteDifference(radius=1e-4), optimizer, steps=steps)
    state, _ = graph.step(graph.init())
    found = graph.hypergradient("u", state)
    monkeypatch.setattr(Step, "multiple", None)
    assert relative_error(found, graph.hypergradient("u", state)) <= 1e-9
    unrolled = graph_of(Unroll(last=1), optimizer, steps=steps)
    assert relative_error(found, unrolled.hypergradient("u", state)) <= 1e-6


def test_a_rate_that_came_down_to_zero_gives_zero():
    graph = graph_of(FiniteDifference(), SGD(learning_rate=Cosine(start=0.1, over=1)))
    state, _ = graph.step(graph.init())
    assert not graph.hypergradient("u", state).any()


@pytest.mark.parametrize("optimizer", SGDS, ids=str)
@pytest.mark.parametrize("count", [0, 2])
def test_the_multiple_is_what_the_update_gives(optimizer, count):
    graph = graph_of(FiniteDifference(), optimizer, steps=1)
    state = graph.init()
    for _ in range(count):
        state, _ = graph.step(state)
    step: Any = Iteration.of(graph._plan, state, {}).retake("w", ("u", "w")).taken()[-1]
    cotangent = normal(3, seed=7)
    assert relative_error(step.multiple * cotangent, step.pull_update(cotangent)) <= 1e-15


@pytest.mark.parametrize("optimizer", [SGD(learning_rate=0.1), Adam(learning_rate=0.1)], ids=str)
@pytest.mark.parametrize("exponent", [-30, -22, 10, 18])
def test_cotangents_at_the_ends_of_what_a_type_can_hold(optimizer, exponent):
    """In float64 at once, in float32 as far as a norm does not overflow; never an error of Python's."""
    method = FiniteDifference(radius=1e-2)
    right = graph_of(method, optimizer).hypergradient("u", graph_of(method, optimizer).init())
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-2)):
        graph = graph_of(method, optimizer, factor=10.0**exponent, dtype=dtype)
        found = graph.hypergradient("u", graph.init()).double() / 10.0**exponent
        assert relative_error(found, right) <= tolerance or (
            dtype is torch.float32 and exponent < -18 and found.norm() == 0
        )


@pytest.mark.parametrize(
    "method",
    [FiniteDifference(), Implicit(inverse=Neumann(terms=1, step_size=0.1), cross=CentralDifference())],
    ids=str,
)
def test_a_norm_that_overflows_is_a_number_that_is_not_finite(method):
    graph = graph_of(method, SGD(learning_rate=0.1), factor=1e30, dtype=torch.float32)
    with pytest.raises(mlo.NumericalError):
        graph.step(graph.init())


def test_a_difference_of_gradients_is_that_of_the_two():
    """Also where only one of the two evaluations depends on a tensor, or on a level."""
    leaves = {"u": {"both": normal(3, seed=1), "above": normal(3, seed=2), "below": normal(3, seed=3)},
              "above": normal(3, seed=4), "below": normal(3, seed=5), "neither": normal(3, seed=6)}  # fmt: skip
    above, below = torch.ones(3, dtype=torch.float64), -torch.ones(3, dtype=torch.float64)

    def function(at: Any, own: Tensor) -> tuple[Tensor, None]:
        side = "above" if own.sum() > 0 else "below"
        return (own * (at["u"]["both"].sin() + at["u"][side].cos() + at[side].exp())).sum(), None

    with torch.no_grad():
        found = difference_of_gradients(function, leaves, iter((above, below)))
        one, two = (gradients(lambda at, place=place: function(at, place), leaves)[0] for place in (above, below))
    assert found.keys() == {"u", "above", "below"}
    assert torch.equal(found["above"], one["above"])
    assert torch.equal(found["below"], -two["below"])
    assert found["u"].keys() == leaves["u"].keys()
    for name, tensor in found["u"].items():
        assert torch.equal(tensor, one["u"][name] - two["u"][name])


def test_a_difference_of_trees_takes_what_is_absent_for_zero():
    one, two = normal(3, seed=1), {"a": normal(2, seed=2)}
    found = _tree.difference({"both": one, "above": two}, {"both": 2 * one, "below": two})
    assert found.keys() == {"both", "above", "below"}
    assert torch.equal(found["both"], -one)
    assert torch.equal(found["above"]["a"], two["a"])
    assert torch.equal(found["below"]["a"], -two["a"])


def test_no_difference_where_nothing_depends_on_what_is_asked_for():
    with torch.no_grad():
        at, place = {"u": normal(3, seed=1)}, normal(3, seed=2)
        assert difference_of_gradients(lambda at, own: (own.sum(), None), at, (place, -place)) == {}
        assert difference_of_gradients(lambda at, own: (own.sum(), None), {}, (place, -place)) == {}

"""Constrained variables: what objectives see, what the optimizer moves, and where a level may start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal, relative_error, respond_by_hand, same_bits, sgd_by_hand
from hypothesis import given
from hypothesis import strategies as st

import mlo
from mlo._constraint import Constraints
from mlo.hypergradient import FiniteDifference, Unroll
from mlo.optimizer import SGD

images = {
    "softplus": torch.nn.functional.softplus,
    "sigmoid": torch.sigmoid,
    "softmax": lambda free: torch.softmax(free, -1),
}


def start_of(kind: str) -> torch.Tensor:
    return images[kind](normal(2, 3, seed=1))


def at_rest(values: Any, batch: Any) -> torch.Tensor:
    return (values["w"] * 0.0).sum()


def level_with(constraints: Any, variables: Any, objective: Any = at_rest) -> mlo.Level:
    return mlo.Level(
        "w",
        objective=objective,
        variables=variables,
        constraints=constraints,
        optimizer=SGD(learning_rate=0.5),
    )


@pytest.mark.parametrize("kind", images)
def test_objectives_see_what_was_given_and_the_state_holds_what_is_moved(kind):
    seen: list[torch.Tensor] = []

    def objective(values: Any, batch: Any) -> torch.Tensor:
        seen.append(values["w"].detach())
        return values["w"].square().sum()

    start = start_of(kind)
    graph = mlo.Graph([level_with({"*": kind}, start, objective)])
    state = graph.init()
    after, _ = graph.step(state)
    assert torch.allclose(seen[0], start, rtol=1e-12)
    assert torch.allclose(images[kind](state.values["w"]), start, rtol=1e-12)
    assert torch.equal(graph.values(state)["w"], seen[0])
    free = state.values["w"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(images[kind](free).square().sum(), free)
    assert torch.allclose(after.values["w"], free.detach() - 0.5 * gradient, rtol=1e-12, atol=1e-14)


def test_half_a_probability_is_exactly_half():
    """MADAO starts p and μ at 0.5, which is 0 before the sigmoid."""
    for dtype in (torch.float32, torch.float64):
        graph = mlo.Graph([level_with({"*": "sigmoid"}, torch.full((3,), 0.5, dtype=dtype))])
        assert torch.equal(graph.init().values["w"], torch.zeros(3, dtype=dtype))
        assert torch.equal(graph.values(graph.init())["w"], torch.full((3,), 0.5, dtype=dtype))


@given(
    numbers=st.lists(st.floats(-30, 30), min_size=2, max_size=6),
    kind=st.sampled_from(sorted(images)),
)
def test_the_inverse_leads_back(numbers, kind):
    """Seen from the objective's side, where a sigmoid may have rounded away what is beyond 1 − 1e-13."""
    constraints = Constraints({"*": kind})
    right = images[kind](torch.tensor(numbers, dtype=torch.float64))
    if kind == "sigmoid" and right.max() == 1:
        return
    found = constraints.apply(constraints.inverse(right))
    assert torch.allclose(found, right, rtol=1e-12, atol=0.0)


@given(number=st.floats(-700, 700))
def test_softplus_is_positive_and_has_its_derivatives(number):
    free = torch.tensor(number, dtype=torch.float64, requires_grad=True)
    found = Constraints({"*": "softplus"}).apply(free)
    (first,) = torch.autograd.grad(found, free, create_graph=True)
    (second,) = torch.autograd.grad(first, free)
    assert found > 0
    assert torch.allclose(first, free.sigmoid(), rtol=1e-12)
    assert torch.allclose(second, free.sigmoid() * (-free).sigmoid(), rtol=1e-9, atol=1e-14)  # torch subtracts there


def test_names_are_matched_by_pattern_and_the_first_wins():
    start = {"p": torch.tensor([0.2, 0.8]), "mu": torch.tensor([0.2, 0.8]), "pi": torch.tensor([0.2, 0.8])}
    constraints = {"pi": "softmax", "p*": "sigmoid"}

    def objective(values: Any, batch: Any) -> torch.Tensor:
        return sum(tensor.sum() for tensor in values["w"].values())

    graph = mlo.Graph([level_with(constraints, start, objective)])
    free = graph.init().values["w"]
    assert torch.allclose(free["p"], torch.logit(start["p"]))
    assert torch.equal(free["mu"], start["mu"])
    assert torch.allclose(free["pi"], start["pi"].log())
    state = graph.init()
    for _ in range(20):
        state, _ = graph.step(state)
    seen = graph.values(state)["w"]
    assert torch.allclose(seen["pi"].sum(), torch.tensor(1.0))
    assert seen["p"].min() > 0
    assert seen["mu"].max() < 0  # nothing holds it


def test_a_module_runs_on_its_constrained_parameters():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        network.weight.abs_()
    graph = mlo.Graph(
        [level_with({"weight": "softplus"}, network, lambda values, batch: values["w"](batch).square().sum())]
    )
    state = graph.init()
    batch = normal(4, 3, seed=5)
    assert torch.allclose(graph.values(state)["w"](batch), network(batch), rtol=1e-12)
    for _ in range(5):
        state, _ = graph.step(state, {"w": batch})
    trained = graph.module("w", state)
    assert (trained.weight > 0).all()
    assert torch.allclose(trained(batch), graph.values(state)["w"](batch))
    assert not torch.allclose(trained(batch), network(batch))


def inner(own: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    return (own.square() * policy).sum() - (own * policy.flip(0)).sum() + 0.1 * own.exp().sum()


def bilevel(method: Any, steps: int = 4) -> mlo.Graph:
    lower = mlo.Level(
        "w",
        objective=lambda values, batch: inner(values["w"], values["u"]),
        variables=torch.tensor([0.3, 0.7, 0.9], dtype=torch.float64),
        constraints={"*": "softplus"},
        given=["u"],
        optimizer=SGD(learning_rate=0.1),
        steps=steps,
        hypergradient=method,
    )
    upper = mlo.Level(
        "u",
        objective=lambda values, batch: (values["w"] - values["u"]).square().sum(),
        variables=torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
        constraints={"*": "softmax"},
        subject_to=["w"],
        optimizer=SGD(learning_rate=0.1),
    )
    return mlo.Graph([lower, upper])


def test_a_hypergradient_is_in_the_free_numbers_of_both_levels():
    graph = bilevel(Unroll())
    state = graph.init()
    u = state.values["u"].clone().requires_grad_()
    policy = u.softmax(-1)
    end = respond_by_hand(
        lambda w, _: inner(torch.nn.functional.softplus(w), policy), state.values["w"], sgd_by_hand(0.1), 4
    )
    (right,) = torch.autograd.grad((torch.nn.functional.softplus(end) - policy).square().sum(), u)
    assert relative_error(graph.hypergradient("u", state), right) <= 1e-12
    before = {name: tensor.clone() for name, tensor in state.values.items()}
    graph.step(state)
    assert same_bits(dict(state.values), before)


def test_finite_differences_move_the_free_numbers():
    found, right = (bilevel(method, steps=1) for method in (FiniteDifference(radius=1e-3), Unroll()))
    state = right.init()
    assert relative_error(found.hypergradient("u", state), right.hypergradient("u", state)) <= 1e-5


def test_starting_elsewhere_is_starting_from_what_objectives_see():
    graph = bilevel(Unroll())
    elsewhere = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64)
    assert torch.allclose(graph.values(graph.init(values={"u": elsewhere}))["u"], elsewhere)


out_of_range = [
    ("sigmoid", [0.5, 1.0], "must be above 0 and below 1 for a sigmoid to reach, starts at 1"),
    ("sigmoid", [0.5, -2.0], "must be above 0 and below 1 for a sigmoid to reach, starts at -2"),
    ("sigmoid", [0.5, float("nan")], "must be above 0 and below 1 for a sigmoid to reach, starts at nan"),
    ("softplus", [0.5, 0.0], "must be above 0 for softplus to reach, starts at 0"),
    (
        "softmax",
        [0.5, 0.6],
        "must be above 0 and sum to 1 along the last dimension for a softmax to reach, is off by 0.1",
    ),
    (
        "softmax",
        [1.0, 0.0],
        "must be above 0 and sum to 1 along the last dimension for a softmax to reach, has an entry 0",
    ),
]


@pytest.mark.parametrize(("kind", "start", "message"), out_of_range)
def test_a_start_out_of_reach_is_refused(kind, start, message):
    with pytest.raises(mlo.GraphError, match=f"level 'w', constraints: 'p' {message}"):
        mlo.Graph([level_with({"*": kind}, {"p": torch.tensor(start)})]).init()
    with pytest.raises(mlo.GraphError, match=f"level 'w', constraints: the variables {message}"):
        mlo.Graph([level_with({"*": kind}, torch.tensor(start))]).init()


def test_wrong_constraints_are_refused():
    with pytest.raises(mlo.UserError, match=r"constraints, 'p': expected softplus, sigmoid, softmax, got 'relu'"):
        level_with({"p": "relu"}, {"p": torch.ones(1)})
    with pytest.raises(mlo.GraphError, match=r"level 'w', constraints: no parameter matches 'q'.\n  Known: p."):
        mlo.Graph([level_with({"q": "sigmoid"}, {"p": torch.ones(1)})])
    with pytest.raises(mlo.GraphError, match=r"no parameter matches 'p'.\n  Known: none: the level is a single tensor"):
        mlo.Graph([level_with({"p": "sigmoid"}, torch.full((1,), 0.5))])


@pytest.mark.parametrize("method", [Unroll(), FiniteDifference()])
def test_a_batch_of_constrained_levels(method):
    graph = bilevel(method)
    state = graph.init()
    states = torch.stack([state.values["u"] + shift for shift in (0.0, 0.3, 1.0)]) * torch.tensor([[1.0], [2.0], [0.5]])

    def found(u: torch.Tensor) -> torch.Tensor:
        moved = mlo.State(
            values={**state.values, "u": u}, buffers=state.buffers, optimizers=state.optimizers, seed=state.seed
        )
        return graph.hypergradient("u", moved)

    together = torch.func.vmap(found)(states)
    assert relative_error(together, torch.stack([found(one) for one in states])) <= 1e-6

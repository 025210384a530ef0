"""Unrolling against plain autograd through the same steps: on two levels, a chain, a diamond, ladders and random graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from helpers import (
    HandUpdate,
    adam_by_hand,
    named,
    normal,
    optimizers,
    relative_error,
    respond_by_hand,
    same_bits,
    sgd_by_hand,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mlo

Loss = Callable[[Any, Sequence[Any]], Tensor]  # of a level's own variables and of those it reads, in a fixed order


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of objective: `variables(index)` of a lower level, `loss(index)` of it; one for the level above."""

    upper: Tensor
    variables: Callable[[int], Any]
    loss: Callable[[int], Loss]
    validation: Loss


def random_quadratics() -> Family:
    """f = ½wᵀHw − wᵀ(c + Σ B_r r), F = ½‖u‖² + Σ ½‖w − t‖²."""

    def loss(index: int) -> Loss:
        root = normal(3, 3, seed=100 + index)
        hessian = 0.3 * root @ root.T + 0.5 * torch.eye(3)
        shift, couplings = normal(3, seed=200 + index), normal(20, 3, 3, seed=300 + index)

        def of(own: Tensor, others: Sequence[Tensor]) -> Tensor:
            drive = shift + sum(matrix @ other for matrix, other in zip(couplings, others, strict=False))
            return 0.5 * own @ hessian @ own - own @ drive

        return of

    def validation(own: Tensor, others: Sequence[Tensor]) -> Tensor:
        targets = normal(20, 3, seed=400)
        pairs = zip(others, targets, strict=False)
        return 0.5 * own.square().sum() + sum(0.5 * (other - target).square().sum() for other, target in pairs)

    return Family(normal(3, seed=1), lambda index: normal(3, seed=2 + index), loss, validation)


def tanh_networks() -> Family:
    """Each level fits a network to data, or to the networks it reads; `u` weighs samples and scales a penalty."""
    x, y, seen = normal(6, 2, seed=500), normal(6, seed=501), normal(5, 2, seed=502)

    def network(w: Mapping[str, Tensor], at: Tensor) -> Tensor:
        return torch.tanh(at @ w["first"] + w["bias"]) @ w["second"]

    def variables(index: int) -> dict[str, Tensor]:
        first, second = 0.7 * normal(2, 4, seed=510 + index), 0.7 * normal(4, seed=530 + index)
        return {"first": first, "bias": 0.1 * normal(4, seed=550 + index), "second": second}

    def loss(index: int) -> Loss:
        def of(own: Mapping[str, Tensor], others: Sequence[Any]) -> Tensor:
            weights = [torch.sigmoid(other) for other in others if isinstance(other, Tensor)]
            teachers = [network(other, x) for other in others if not isinstance(other, Tensor)]
            misses = (network(own, x) - torch.stack([y, *teachers]).mean(0)).square()
            return (misses * (weights[0] if weights else 1.0)).mean() + 1e-2 * own["first"].square().sum()

        return of

    def validation(own: Tensor, others: Sequence[Any]) -> Tensor:
        return sum((network(other, seen) - 0.3).square().mean() for other in others) + 1e-2 * own.square().sum()

    return Family(normal(6, seed=503), variables, loss, validation)


families = {"quadratics": random_quadratics(), "networks": tanh_networks()}

# Which lower levels read which, in an order in which they can be solved; "u" is the level above.
shapes = {
    "two levels": {"w": ["u"]},
    "chain": {"a": ["u"], "b": ["a"]},
    "chain with skip": {"a": ["u"], "b": ["a", "u"]},
    "diamond": {"a": ["u"], "b": ["a"], "c": ["a", "u"], "d": ["b", "c"]},
}


def levels_of(
    shape: Mapping[str, Sequence[str]], family: Family, optimizer: Any, steps: int, method: Any = None
) -> list[mlo.Level]:
    """The shape as levels, in its order, `u` last."""

    def objective(loss: Loss, name: str, read: Sequence[str]) -> Any:
        return lambda values, batch: loss(values[name], [values[other] for other in read])

    lower = [
        mlo.Level(
            name,
            objective=objective(family.loss(index), name, read),
            variables=family.variables(index),
            given=read,
            optimizer=optimizer,
            steps=steps,
            hypergradient=method or mlo.hypergradient.Unroll(),
        )
        for index, (name, read) in enumerate(shape.items())
    ]
    names = list(shape)
    upper = mlo.Level(
        "u",
        objective=objective(family.validation, "u", names),
        variables=family.upper,
        subject_to=names,
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
    )
    return [*lower, upper]


def by_hand(shape: Mapping[str, Sequence[str]], family: Family, update: HandUpdate, steps: int) -> Tensor:
    """dF/du by plain autograd through every step of every level."""
    u = family.upper.clone().requires_grad_()
    ends: dict[str, Any] = {"u": u}
    for index, (name, read) in enumerate(shape.items()):
        loss, others = family.loss(index), [ends[other] for other in read]
        ends[name] = respond_by_hand(
            lambda own, _, loss=loss, others=others: loss(own, others), family.variables(index), update, steps
        )
    value = family.validation(u, [ends[name] for name in shape])
    return torch.autograd.grad(value, u)[0]


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("shape", ["two levels", "chain", "diamond"])
def test_unroll_equals_autograd(shape, family, optimizer, steps):
    rule, update = optimizers[optimizer]
    graph = mlo.Graph(levels_of(shapes[shape], families[family], rule, steps))
    found = graph.hypergradient("u", graph.init())
    assert relative_error(found, by_hand(shapes[shape], families[family], update, steps)) <= 1e-8


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("optimizer", optimizers)
def test_every_optimizer_unrolled_equals_autograd_through_the_loop_written_out(optimizer, replay, steps):
    (rule, update), method = optimizers[optimizer], mlo.hypergradient.Unroll(replay=replay)
    for family in families.values():
        graph = mlo.Graph(levels_of(shapes["chain with skip"], family, rule, steps, method))
        found = graph.hypergradient("u", graph.init())
        assert relative_error(found, by_hand(shapes["chain with skip"], family, update, steps)) <= 1e-8


@pytest.mark.parametrize("shape", ["chain with skip", "diamond"])
def test_the_order_of_declaration_changes_no_bit(shape):
    rule, update = optimizers["momentum"]
    levels = levels_of(shapes[shape], families["networks"], rule, 3)
    right = by_hand(shapes[shape], families["networks"], update, 3)
    first = None
    for order in permutations(levels):
        graph = mlo.Graph(order)
        state = graph.init()
        after, metrics = graph.step(state)
        found = graph.order, metrics.pullbacks, graph.hypergradient("u", state), after.values
        first = first or found
        assert found[:2] == first[:2]
        assert torch.equal(found[2], first[2])
        assert all(same_bits(found[3][name], first[3][name]) for name in first[3])
        assert relative_error(found[2], right) <= 1e-12


@pytest.mark.parametrize("names", [("z", "y", "x", "v"), ("b", "d", "a", "c"), ("v", "a", "z", "B")])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_names_that_sort_against_the_arrows_change_nothing(optimizer, names):
    rule, update = optimizers[optimizer]
    renamed = dict(zip(shapes["diamond"], names, strict=True))
    shape = {renamed[name]: [renamed.get(other, other) for other in read] for name, read in shapes["diamond"].items()}
    graph = mlo.Graph(levels_of(shape, families["networks"], rule, 4))
    found = graph.hypergradient("u", graph.init())
    assert relative_error(found, by_hand(shapes["diamond"], families["networks"], update, 4)) <= 1e-8


def ladder(rungs: int) -> dict[str, list[str]]:
    """Each rung reads the two before it; the outermost, `u`, is the first."""
    names = ["u", *(f"rung{index:02}" for index in range(1, rungs))]
    return {names[index]: names[max(0, index - 2) : index] for index in range(1, rungs)}


@pytest.mark.parametrize("rungs", [2, 3, 8, 12])
@pytest.mark.parametrize("method", [mlo.hypergradient.Unroll(), mlo.hypergradient.FiniteDifference()])
def test_a_ladder_of_d_levels_takes_d_minus_1_pullbacks(rungs, method):
    """A library that follows each path on its own would take Fibonacci(d): 109 products at d = 8."""
    shape, family = ladder(rungs), families["quadratics"]
    graph = mlo.Graph(levels_of(shape, family, optimizers["sgd"][0], 1, method))
    state = graph.init()
    _, metrics = graph.step(state)
    assert len(metrics.pullbacks) == rungs - 1
    assert metrics.pullbacks == tuple(("u", name) for name in reversed(shape))
    assert metrics.products <= rungs - 1
    right = by_hand(shape, family, sgd_by_hand(0.1), 1)
    assert relative_error(graph.hypergradient("u", state), right) <= 1e-9


def test_the_measurements_and_batches_of_every_step_are_its_own():
    """`Batches` gives each step its own; the loss is the last step's, measurements are means over the steps."""
    draws = normal(4, 3, seed=600)

    def inner(values, batch):
        loss = 0.5 * (values["w"] - batch * values["u"]).square().sum()
        return loss, {"loss": loss, "first": batch[0]}

    w = mlo.Level(
        "w", objective=inner, variables=torch.zeros(3), given=["u"], optimizer=optimizers["momentum"][0], steps=4
    )
    u = mlo.Level(
        "u",
        objective=lambda values, batch: (values["w"] @ batch).square(),
        variables=torch.tensor(0.7),
        subject_to=["w"],
        optimizer=optimizers["sgd"][0],
    )
    graph = mlo.Graph([w, u])
    state, final = graph.init(), normal(3, seed=601)
    batches = {"w": mlo.Batches(list(draws)), "u": final}
    leaf, seen = torch.tensor(0.7, requires_grad=True), []

    def loss(own: Tensor, step: int) -> Tensor:
        seen.append(0.5 * (own - draws[step] * leaf).square().sum())
        return seen[-1]

    end = respond_by_hand(loss, torch.zeros(3), sgd_by_hand(0.05, 0.9), 4)
    (right,) = torch.autograd.grad((end @ final).square(), leaf)
    assert relative_error(graph.hypergradient("u", state, batches), right) <= 1e-12
    _, metrics = graph.step(state, batches)
    assert torch.allclose(metrics.losses["w"], seen[-1], rtol=1e-14)
    assert torch.allclose(metrics.measured["w"]["loss"], torch.stack(seen).mean(), rtol=1e-14)
    assert torch.allclose(metrics.measured["w"]["first"], draws[:, 0].mean(), rtol=1e-14)


def test_the_start_of_a_response_is_held_fixed():
    """No derivative along a warm start: the second iteration's response starts from a state that once depended on u."""
    graph = mlo.Graph(levels_of(shapes["two levels"], families["quadratics"], optimizers["adam"][0], 3))
    state, _ = graph.step(graph.init())
    u = state.values["u"].clone().requires_grad_()
    memory = (3, {name: named(moment) for name, moment in state.optimizers["w"].moments.items()})
    loss = families["quadratics"].loss(0)
    end = respond_by_hand(lambda own, _: loss(own, [u]), state.values["w"], adam_by_hand(0.02), 3, memory)
    (right,) = torch.autograd.grad(families["quadratics"].validation(u, [end]), u)
    assert relative_error(graph.hypergradient("u", state), right) <= 1e-12


# Property tests.


@st.composite
def acyclic(draw: Any) -> tuple[dict[str, list[str]], list[int]]:
    """Lower levels with names in any alphabetical order, each reading `u` or levels before it; and a listing order."""
    names = draw(st.permutations(["a", "b", "c", "d", "e"]))[: draw(st.integers(1, 5))]
    shape = {}
    for index, name in enumerate(names):
        before = ["u", *names[:index]]
        shape[name] = sorted(draw(st.sets(st.sampled_from(before), min_size=1)), key=before.index)
    return shape, draw(st.permutations(range(len(names) + 1)))


@given(acyclic())
@settings(max_examples=40)
def test_random_graphs_run_in_dependency_order_and_equal_autograd(drawn):
    shape, listing = drawn
    rule, update = optimizers["momentum"]
    levels = levels_of(shape, families["quadratics"], rule, 2)
    graph, shuffled = mlo.Graph(levels), mlo.Graph([levels[index] for index in listing])
    place = {name: index for index, name in enumerate(graph.order)}
    assert all(place[other] < place[name] for name, read in shape.items() for other in read if other != "u")
    assert graph.order[-1] == "u"
    assert graph.order == shuffled.order
    found = graph.hypergradient("u", graph.init())
    assert torch.equal(found, shuffled.hypergradient("u", shuffled.init()))
    assert relative_error(found, by_hand(shape, families["quadratics"], update, 2)) <= 1e-10


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(mlo.hypergradient.Unroll(), 1e-11), (mlo.hypergradient.FiniteDifference(radius=1e-3), 1e-5)],
)
@given(factor=st.floats(-3, 3), seeds=st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)))
@settings(max_examples=15)
def test_a_pullback_is_linear_in_its_cotangent(method, tolerance, factor, seeds):
    """F = ⟨λ, w*⟩ has the cotangent λ on w*; finite differences are linear to O(radius²)."""
    family = families["networks"]
    (inner, _) = levels_of(shapes["two levels"], family, optimizers["momentum"][0], 2, method)
    outer = mlo.Level(
        "u",
        objective=lambda values, batch: sum((values["w"][name] * batch[name]).sum() for name in batch),
        variables=family.upper,
        subject_to=["w"],
        optimizer=optimizers["sgd"][0],
    )
    graph = mlo.Graph([inner, outer])
    state = graph.init()

    def pulled(cotangent: dict[str, Tensor]) -> Tensor:
        return graph.hypergradient("u", state, {"u": cotangent})

    one, two = (
        {
            name: normal(*tensor.shape, seed=seed + place)
            for place, (name, tensor) in enumerate(state.values["w"].items())
        }
        for seed in seeds
    )
    both = pulled({name: one[name] + factor * two[name] for name in one})
    size = pulled(one).norm() + abs(factor) * pulled(two).norm()
    assert (both - pulled(one) - factor * pulled(two)).norm() <= tolerance * size
    assert pulled({name: torch.zeros_like(tensor) for name, tensor in one.items()}).norm() == 0

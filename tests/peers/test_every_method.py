"""What other libraries get wrong, asked of every method that is shipped: the table of `tests/testing/test_methods.py`."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import named, normal, relative_error, same_bits
from hypothesis import strategies as st
from testing.test_methods import METHODS
from torch import Tensor, nn

import mlo
from mlo.optimizer import SGD, Adam, AdamW, RMSprop
from mlo.testing import PROPERTIES, ClosedForm, check_method


def asked_of(*properties: str) -> Any:
    """Every row of the table that leaves out none of `properties`: a new method is asked by being in it."""
    rows = [row for row in METHODS if not {*properties} & {*row[3]}]
    return pytest.mark.parametrize(
        ("method", "answer", "tolerance", "without"), rows, ids=[repr(row[0]).replace("mlo.", "") for row in rows]
    )


def holds(row: tuple[Any, ...], problem: ClosedForm, *properties: str) -> None:
    """Only these properties, those that the method claims, on `problem` alone; steps and optimizer are drawn."""
    method, answer, tolerance, without = row
    left_out = (PROPERTIES.keys() - set(properties)) | set(without)
    check_method(method, answer=answer, tolerance=tolerance, problems=st.just(problem), without=left_out, examples=4)


# Which levels, and how they keep their numbers.


def ladder(rungs: int) -> ClosedForm:
    """A ladder of so many levels, the outermost counted: each reads the two before it."""
    line = ("u", *(f"rung{index:02}" for index in range(1, rungs)))
    reads = {line[index]: line[max(0, index - 2) : index] for index in range(1, rungs)}
    return ClosedForm(reads=reads, seen=line[1:], layouts=dict.fromkeys(line, (("", (2,)),)), decay=0.1)


@asked_of("cost")
def test_the_cost_of_a_ladder_is_linear_in_its_levels(method, answer, tolerance, without):
    """d − 1 pullbacks, where following each path takes Fibonacci(d): 109 at d = 8. Counted, and without a clock."""
    counted = {}
    for rungs in (3, 6, 9, 12):
        graph = mlo.Graph(ladder(rungs).levels(method, steps=2))
        _, metrics = graph.step(graph.init())
        assert len(metrics.pullbacks) == len(set(metrics.pullbacks)) == rungs - 1
        predicted = graph.cost(1)
        assert predicted.gradients >= metrics.gradients
        assert predicted.products >= metrics.products
        counted[rungs] = (metrics.gradients, metrics.products), (predicted.gradients, predicted.products)
    for kind in (0, 1) if "exact cost" not in without else (1,):
        at = [torch.tensor(counted[rungs][kind]) for rungs in (3, 6, 9, 12)]
        assert torch.equal(at[1] - at[0], at[2] - at[1])
        assert torch.equal(at[2] - at[1], at[3] - at[2])
    holds((method, answer, tolerance, without), ladder(8), "closed form")


@pytest.mark.parametrize("levels", [3, 4])
@asked_of()
def test_a_graph_may_have_more_than_two_levels(method, answer, tolerance, without, levels):
    line = ("u", *"abcd"[: levels - 1])
    reads = {name: (before,) for before, name in pairwise(line)}
    layouts = dict.fromkeys(line, (("", (3,)),))
    chain = ClosedForm(reads=reads, seen=(line[-1],), layouts=layouts, family="logistic", seed=levels)
    holds((method, answer, tolerance, without), chain, "closed form", "central differences")


@pytest.mark.parametrize("family", ["quadratic", "logistic"])
@asked_of()
def test_zero_dimensional_tensors_have_their_hypergradient(method, answer, tolerance, without, family):
    """Alone, and under `torch.func.vmap`."""
    layouts = {"u": (("", ()),), "a": (("", ()),), "b": (("one", ()), ("two", ()))}
    scalars = ClosedForm(reads={"a": ("u",), "b": ("u", "a")}, seen=("a", "b"), layouts=layouts, family=family, seed=3)
    graph = mlo.Graph(scalars.levels(method, steps=1))
    found = graph.hypergradient("u", graph.init())
    assert found.shape == ()
    assert found != 0
    holds((method, answer, tolerance, without), scalars, "closed form", "response", "vmap", "central differences")


@asked_of("vmap")
def test_vmap_over_penalties(method, answer, tolerance, without):
    layouts = dict.fromkeys("uabc", (("slope", (2,)), ("shift", ())))
    reads = {"a": ("u",), "b": ("u",), "c": ("a", "b")}
    diamond = ClosedForm(reads=reads, seen=("a", "c"), layouts=layouts, family="logistic", decay=0.1)
    holds((method, answer, tolerance, without), diamond, "vmap")


# State: weights, buffers, draws, moments.


class Network(nn.Module):
    """Batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def module() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


SAMPLES, TARGETS = normal(7, 3, seed=1), normal(7, 2, seed=2)


def network_graph(method: Any, optimizer: Any = None, *, steps: int = 2, weights: Network | None = None) -> mlo.Graph:
    """Sample weights above a network; curvatures are near ½."""

    def inner(values: Any, batch: Any) -> Tensor:
        fit = ((values["w"](SAMPLES) - TARGETS).square().sum(1) * values["u"].sigmoid()).mean()
        return 0.02 * fit + 0.25 * sum(tensor.square().sum() for tensor in values["w"].values())

    def outer(values: Any, batch: Any) -> Tensor:
        return (values["w"](SAMPLES) - 2 * TARGETS).square().mean()

    rule = optimizer or SGD(learning_rate=0.1, momentum=0.5)
    lower = mlo.Level(
        "w",
        objective=inner,
        variables=weights or module(),
        given=("u",),
        optimizer=rule,
        steps=steps,
        hypergradient=method,
    )
    upper = mlo.Level(
        "u",
        objective=outer,
        variables=normal(7, seed=3),
        subject_to=("w",),
        optimizer=Adam(learning_rate=0.01),
    )
    return mlo.Graph([lower, upper])


def tensors_of(state: mlo.State) -> dict[str, Tensor]:
    kinds: dict[str, Mapping[str, Any]] = {"value": state.values, "buffer": state.buffers}
    kinds |= {f"moments of {name}": memory.moments for name, memory in state.optimizers.items()}
    return {
        f"{kind} {level} {name}": tensor
        for kind, trees in kinds.items()
        for level, tree in trees.items()
        for name, tensor in named(tree).items()
    }


@asked_of("purity")
def test_weights_and_buffers_are_what_they_were_bit_for_bit(method, answer, tolerance, without):
    """Perturbing and perturbing back is not the identity in floating point; nothing is written to at all."""
    weights = module().eval()
    caller = {**dict(weights.named_parameters()), **dict(weights.named_buffers())}
    graph = network_graph(method, weights=weights)
    state, _ = graph.step(graph.init(seed=1))
    held = {**tensors_of(state), **caller}
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in held.items()}
    generator = torch.get_rng_state()
    graph.hypergradient("u", state)
    graph.step(state)
    for name, tensor in held.items():
        assert torch.equal(tensor.detach(), before[name][0]), name
        assert tensor._version == before[name][1], f"{name} was written to"
        assert tensor.grad is None, name
    assert torch.equal(torch.get_rng_state(), generator)
    assert not weights.training


@asked_of("purity")
def test_running_statistics_count_each_training_step_once(method, answer, tolerance, without):
    """As those of the level without anything above it, however often its objective is evaluated again."""
    graph = network_graph(method)
    lower = graph.levels["w"]
    alone = mlo.Graph([lower, mlo.Level("u", variables=graph.levels["u"].variables)])
    state, other = graph.init(seed=2), alone.init(seed=2)
    for iteration in range(1, 4):
        other = replace(other, values={**other.values, "u": state.values["u"]})
        graph.hypergradient("u", state)
        (state, _), (other, _) = graph.step(state), alone.step(other)
        assert state.buffers["w"]["layers.1.num_batches_tracked"] == 2 * iteration
        assert same_bits(state.buffers["w"], other.buffers["w"])
        assert same_bits(state.values["w"], other.values["w"])


@asked_of("common noise")
def test_dropout_is_drawn_once_for_all_evaluations_of_a_step(method, answer, tolerance, without):
    """Every forward pass of a step has the masks of that step: what each one dropped is written down."""
    weights, seen = module(), []
    dropped = weights.layers[3]
    dropped.register_forward_hook(lambda layer, given, made: seen.append((made == 0).detach()))
    graph = network_graph(method, steps=1, weights=weights)
    state = graph.init(seed=3)
    first = graph.hypergradient("u", state)
    lower = [mask for mask in seen if torch.equal(mask, seen[0])]
    assert len(lower) == len(seen) - 1, "all but the evaluation of the upper level"
    assert same_bits(graph.hypergradient("u", state), first)


@pytest.mark.parametrize(
    "optimizer", [SGD(learning_rate=0.1, momentum=0.9), Adam(learning_rate=0.01)], ids=["sgd", "adam"]
)
@asked_of()
def test_resuming_is_the_same_run_bit_for_bit(method, answer, tolerance, without, optimizer):
    """Values, buffers, moments, draws: six iterations, and three, stored and loaded in between, and three."""
    graph = network_graph(method, optimizer)
    whole = graph.init(seed=4)
    for iteration in range(6):
        if iteration == 3:
            stored = pickle.dumps(whole)
        whole, metrics = graph.step(whole)
    torch.rand(3)  # whatever happened to the global generator
    state, again = pickle.loads(stored), network_graph(method, optimizer)
    for _ in range(3):
        state, resumed = again.step(state)
    assert same_bits(tensors_of(state), tensors_of(whole))
    assert same_bits(dict(resumed.losses), dict(metrics.losses))


# Numbers that lie.


def bilevel(method: Any, optimizer: Any, inner: Any, outer: Any, start: Tensor, u: Tensor, steps: int = 1) -> mlo.Graph:
    lower = mlo.Level(
        "w", objective=inner, variables=start, given=("u",), optimizer=optimizer, steps=steps, hypergradient=method
    )
    return mlo.Graph(
        [
            lower,
            mlo.Level("u", objective=outer, variables=u, subject_to=("w",), optimizer=SGD(learning_rate=0.1)),
        ]
    )


def pull_at_zero(values: Any, batch: Any) -> Tensor:
    """H = I and C = −I, and a gradient of exactly zero at w = u = 0."""
    return 0.5 * (values["w"] - values["u"]).square().sum()


@asked_of("loud")
def test_a_derivative_that_is_not_a_number_stops_the_run_and_is_never_zero(method, answer, tolerance, without):
    def root(values: Any, batch: Any) -> Tensor:
        return values["w"].square().sum().sqrt()  # no derivative where w ends, at 0

    graph = bilevel(method, SGD(learning_rate=0.5), pull_at_zero, root, torch.zeros(3), torch.zeros(3))
    with pytest.raises(mlo.NumericalError, match=r"level 'u', step 1: the part of the hypergradient through 'w'"):
        graph.step(graph.init())
    assert not graph.hypergradient("u", graph.init()).isfinite().any()


EPSILON = 1e-2
adaptive = {
    "Adam": Adam(learning_rate=0.1, epsilon=EPSILON),
    "AdamW": AdamW(learning_rate=0.1, epsilon=EPSILON, weight_decay=0.0),
    "RMSprop": RMSprop(learning_rate=0.1, epsilon=EPSILON),
    "centered RMSprop": RMSprop(learning_rate=0.1, epsilon=EPSILON, centered=True),
}


@pytest.mark.parametrize("optimizer", adaptive)
@asked_of("closed form", "zero gradients")
def test_adaptive_steps_where_every_gradient_is_exactly_zero(method, answer, tolerance, without, optimizer):
    """One step there is w' = w − ηg/ε to first order: w' = (η/ε)u. Implicit methods see H = I and no optimizer."""
    cotangent = normal(3, seed=5)
    if isinstance(method, mlo.hypergradient.ZerothOrder):
        method = replace(method, radius=1e-7)  # within the place where a step of Adam is linear

    def outer(values: Any, batch: Any) -> Tensor:
        return values["w"] @ cotangent

    graph = bilevel(method, adaptive[optimizer], pull_at_zero, outer, torch.zeros(3), torch.zeros(3))
    if callable(answer):
        right = answer(torch.eye(3), cotangent)
    else:
        right = cotangent if answer in ("exact", "first_order") else 0.1 / EPSILON * cotangent
    assert relative_error(graph.hypergradient("u", graph.init()), right) <= max(tolerance, 1e-9)


@asked_of("closed form")
def test_adamw_is_differentiated_or_refused_with_its_reason(method, answer, tolerance, without):
    """w' = (1 − ηδ)w − η m̂/(√v̂ + ε): by autograd through that line; its decay belongs to no objective."""
    decayed = AdamW(learning_rate=0.1, weight_decay=0.2)
    start, at, target = normal(3, seed=6), normal(3, seed=7), normal(3, seed=8)

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"] * values["u"]).exp().sum() + values["w"].square().sum()

    def outer(values: Any, batch: Any) -> Tensor:
        return 0.5 * (values["w"] - target).square().sum()

    if method.objection(decayed):
        with pytest.raises(mlo.GraphError, match=r"level 'w', hypergradient: AdamW's decoupled weight decay"):
            bilevel(method, decayed, inner, outer, start, at)
        assert method.objection(AdamW(learning_rate=0.1, weight_decay=0.0)) is None
        return
    u = at.clone().requires_grad_()
    g = u * (start * u).exp() + 2 * start
    w = (1 - 0.1 * 0.2) * start - 0.1 * g / (g.square().sqrt() + 1e-8)
    (right,) = torch.autograd.grad(0.5 * (w - target).square().sum(), u)
    graph = bilevel(method, decayed, inner, outer, start, at)
    error = (graph.hypergradient("u", graph.init()) - right).norm()
    assert error <= tolerance * (1 + right.norm())


# What is promised, and how closely it is asked for.


def test_exact_and_unrolled_answers_are_asked_for_to_eight_digits():
    assert {row[1] for row in METHODS if isinstance(row[1], str)} >= {"exact", "unrolled", "last_step", "first_order"}
    for method, answer, tolerance, _ in METHODS:
        compares = isinstance(method, mlo.hypergradient.ZerothOrder)  # is right to the square of its radius only
        if answer in ("exact", "unrolled", "first_order") and not compares:
            assert tolerance <= 1e-8, method

"""`graph.hypergradient` under `torch.func.vmap` of the user's, against the same one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import normal, optimizers, relative_error
from torch import Tensor, nn
from torch.func import vmap

import mlo
from mlo.hypergradient import FiniteDifference, Unroll

methods = pytest.mark.parametrize("method", [Unroll(), FiniteDifference()], ids=lambda value: type(value).__name__)
inner_optimizers = pytest.mark.parametrize("optimizer", ["momentum", "adam"])
MANY = 4


def ridge(method: Any, optimizer: str, *, steps: int = 3) -> mlo.Graph:
    """A penalty for each of three numbers of `w`, and `v`, which fits what `w` makes of the data."""
    x, y, seen = normal(6, 3, seed=1), normal(6, seed=2), normal(5, 3, seed=3)

    def fit(values: Any, batch: Any) -> Tensor:
        w = values["w"]
        return (torch.tanh(x @ w["slope"]) + w["shift"] - y).square().mean() + values["u"].exp() @ w["slope"].square()

    def imitate(values: Any, batch: Any) -> Tensor:
        return (x @ values["v"] - x @ values["w"]["slope"]).square().mean() + values["u"].sum() * values[
            "v"
        ].square().sum()

    def validate(values: Any, batch: Any) -> Tensor:
        return (seen @ values["w"]["slope"] + seen @ values["v"]).square().mean() + 1e-2 * values["u"].square().sum()

    level = {"optimizer": optimizers[optimizer][0], "hypergradient": method, "steps": steps}
    slope = {"slope": normal(3, seed=4), "shift": torch.tensor(0.3)}
    return mlo.Graph(
        [
            mlo.Level("w", objective=fit, variables=slope, given=["u"], **level),
            mlo.Level("v", objective=imitate, variables=normal(3, seed=5), given=["u", "w"], **level),
            mlo.Level(
                "u",
                objective=validate,
                variables=normal(3, seed=6),
                subject_to=["w", "v"],
                optimizer=mlo.optimizer.SGD(learning_rate=0.1),
            ),
        ]
    )


def one_by_one(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    return torch.stack([function(*(batch[index] for batch in batches)) for index in range(MANY)])


@methods
@inner_optimizers
@pytest.mark.parametrize("warm", [False, True])
def test_a_batch_of_penalties(method, optimizer, warm):
    graph = ridge(method, optimizer)
    state = graph.init()
    if warm:
        state, _ = graph.step(state)

    def gradient(u: Tensor) -> Tensor:
        return graph.hypergradient("u", replace(state, values={**state.values, "u": u}))

    many = normal(MANY, 3, seed=10)
    assert relative_error(vmap(gradient)(many), one_by_one(gradient, many)) <= 1e-12


@methods
@inner_optimizers
def test_a_batch_of_initial_states(method, optimizer):
    """Values and what optimizers remember."""
    graph = ridge(method, optimizer)
    state, _ = graph.step(graph.init())

    def gradient(slope: Tensor, v: Tensor, shift: Tensor) -> Tensor:
        values = {**state.values, "w": {"slope": slope, "shift": shift}, "v": v}
        moments = {name: 0.5 * moment + v.square() for name, moment in state.optimizers["v"].moments.items()}
        memories = {**state.optimizers, "v": replace(state.optimizers["v"], moments=moments)}
        return graph.hypergradient("u", replace(state, values=values, optimizers=memories))

    many = normal(MANY, 3, seed=11), normal(MANY, 3, seed=12), normal(MANY, seed=13)
    assert relative_error(vmap(gradient)(*many), one_by_one(gradient, *many)) <= 1e-12


@methods
@inner_optimizers
def test_a_batch_of_data(method, optimizer):
    """What differs may also be the batch, and steps may each have their own."""

    def fit(values: Any, batch: Tensor) -> Tensor:
        return (values["w"] - batch * values["u"]).square().sum() + (values["w"] * values["u"]).cosh().sum()

    graph = mlo.Graph(
        [
            mlo.Level(
                "w",
                objective=fit,
                variables=normal(3, seed=1),
                given=["u"],
                optimizer=optimizers[optimizer][0],
                hypergradient=method,
                steps=2,
            ),
            mlo.Level(
                "u",
                objective=lambda values, batch: (values["w"] * batch).sum().square(),
                variables=normal(3, seed=2),
                subject_to=["w"],
                optimizer=optimizers["sgd"][0],
            ),
        ]
    )
    state = graph.init()

    def gradient(train: Tensor, validation: Tensor) -> Tensor:
        return graph.hypergradient("u", state, {"w": mlo.Batches([train, train + 1]), "u": validation})

    many = normal(MANY, 3, seed=21), normal(MANY, 3, seed=22)
    assert relative_error(vmap(gradient)(*many), one_by_one(gradient, *many)) <= 1e-12


@methods
@inner_optimizers
def test_a_batch_of_whole_iterations(method, optimizer):
    graph = ridge(method, optimizer, steps=2)
    state = graph.init()

    def end(u: Tensor) -> Tensor:
        after, metrics = graph.step(replace(state, values={**state.values, "u": u}))
        after, _ = graph.step(after)
        return torch.cat(
            [after.values["u"], after.values["v"], metrics.norms["u"].total[None], metrics.losses["w"][None]]
        )

    many = normal(MANY, 3, seed=10)
    assert relative_error(vmap(end)(many), one_by_one(end, many)) <= 1e-12


@methods
def test_a_batch_of_networks(method):
    """A module, attention and batch normalization included, with parameters that differ."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            mixed, _ = self.attend(hidden, hidden, hidden, need_weights=False)
            return self.head(mixed.mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network()
    labels = torch.arange(6) % 3

    def inner(values: Any, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(values["w"](batch), labels, reduction="none")
        return (torch.sigmoid(values["u"]) * losses).mean()

    def outer(values: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(values["w"](batch), labels)

    graph = mlo.Graph(
        [
            mlo.Level(
                "w",
                objective=inner,
                variables=network,
                given=["u"],
                optimizer=optimizers["momentum"][0],
                hypergradient=method,
                steps=2,
            ),
            mlo.Level(
                "u", objective=outer, variables=normal(6, seed=1), subject_to=["w"], optimizer=optimizers["sgd"][0]
            ),
        ]
    )
    state, batches = graph.init(), {"w": normal(6, 3, 4, seed=2), "u": normal(6, 3, 4, seed=3)}

    def gradient(weight: Tensor, u: Tensor) -> Tensor:
        moved = {**state.values["w"], "first.weight": weight}
        return graph.hypergradient("u", replace(state, values={"w": moved, "u": u}), batches)

    many = normal(MANY, 4, 4, seed=4), normal(MANY, 6, seed=5)
    assert relative_error(vmap(gradient)(*many), one_by_one(gradient, *many)) <= 1e-11


@inner_optimizers
def test_entries_without_a_gradient_stay_zero_inside_a_transform(optimizer):
    """Adam's root of a second moment of zero, where there is no plain autograd to ask."""

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"][1:] * values["u"]).exp().sum() + 0.0 * values["w"][0]

    graph = mlo.Graph(
        [
            mlo.Level(
                "w",
                objective=inner,
                variables=normal(4, seed=1),
                given=["u"],
                optimizer=optimizers[optimizer][0],
                steps=3,
            ),
            mlo.Level(
                "u",
                objective=lambda values, batch: values["w"].square().sum(),
                variables=normal(3, seed=2),
                subject_to=["w"],
                optimizer=optimizers["sgd"][0],
            ),
        ]
    )
    state = graph.init()

    def gradient(u: Tensor) -> Tensor:
        return graph.hypergradient("u", replace(state, values={**state.values, "u": u}))

    many = normal(MANY, 3, seed=10)
    found = vmap(gradient)(many)
    assert found.isfinite().all()
    assert relative_error(found, one_by_one(gradient, many)) <= 1e-9


@methods
def test_a_choice_is_made_for_each_of_a_batch(method):
    """Classes are drawn from the values of their own instance, and stay as drawn."""

    def inner(values: Any, batch: Any) -> Tensor:
        p = torch.softmax(values["u"], 0)
        chosen = values.once("class", lambda: (batch > p.cumsum(0)[:-1]).sum())
        weights = (torch.arange(3) == chosen) * p / p.detach()
        return (weights * (values["w"] - 1).square()).sum() + 0.5 * values["w"].square().sum()

    graph = mlo.Graph(
        [
            mlo.Level(
                "w",
                objective=inner,
                variables=torch.zeros(3),
                given=["u"],
                optimizer=optimizers["sgd"][0],
                hypergradient=method,
            ),
            mlo.Level(
                "u",
                objective=lambda values, batch: values["w"].square().sum(),
                variables=normal(3, seed=2),
                subject_to=["w"],
                optimizer=optimizers["sgd"][0],
            ),
        ]
    )
    state = graph.init()

    def gradient(u: Tensor) -> Tensor:
        return graph.hypergradient("u", replace(state, values={**state.values, "u": u}), {"w": torch.tensor(0.5)})

    many = 2 * normal(MANY, 3, seed=10)
    expected = one_by_one(gradient, many)
    assert relative_error(vmap(gradient)(many), expected) <= 1e-12
    drawn = (torch.softmax(many, 1).cumsum(1)[:, :-1] < 0.5).sum(1)
    assert len(set(drawn.tolist())) > 1, "the instances draw different classes"

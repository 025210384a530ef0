"""Forward-mode unrolling and comparisons of responses, against unrolled steps and closed forms."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import normal, optimizers, relative_error
from torch import Tensor

import mlo
from mlo.hypergradient import AbstractHypergradient, Exact, Forward, Unroll, ZerothOrder

X, Y = normal(12, 3, seed=1), normal(12, seed=2)


def loss(values: Any, batch: Any) -> Tensor:
    """A small network; u chooses a penalty for every weight, and `shift` moves the data."""
    w, u = values["w"], values["u"]
    out = torch.tanh((X + u["shift"]) @ w["first"]) @ w["second"]
    penalty = u["penalties"].exp() @ torch.cat([w["first"].square().sum(0), w["second"].square().sum()[None]])
    return (out - Y).square().mean() + 0.1 * penalty


def graph(method: AbstractHypergradient, optimizer: Any, steps: int) -> mlo.Graph:
    start = {"first": normal(3, 2, seed=3), "second": normal(2, seed=4)}
    return mlo.Graph(
        [
            mlo.Level(
                "w",
                objective=loss,
                variables=start,
                given=("u",),
                optimizer=optimizer,
                steps=steps,
                hypergradient=method,
            ),
            mlo.Level(
                "u",
                objective=lambda values, _: values["w"]["second"].pow(3).sum() + values["w"]["first"].sum(),
                variables={"penalties": normal(3, seed=5), "shift": torch.tensor(0.1, dtype=torch.float64)},
                subject_to=("w",),
                optimizer=optimizers["momentum"][0],
            ),
        ]
    )


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("optimizer", list(optimizers))
def test_forward_is_backward(optimizer, steps):
    """Momentum, moments, decay and all: one derivative, in two orders of the same products."""
    forward, backward = (graph(method, optimizers[optimizer][0], steps) for method in (Forward(), Unroll()))
    state = forward.init()
    assert relative_error(forward.hypergradient("u", state), backward.hypergradient("u", state)) <= 1e-10


def test_forward_goes_on_from_what_the_optimizer_remembers():
    forward, backward = (graph(method, optimizers["adam"][0], 3) for method in (Forward(), Unroll()))
    state = forward.init()
    for _ in range(3):
        state, _ = forward.step(state)
    assert relative_error(forward.hypergradient("u", state), backward.hypergradient("u", state)) <= 1e-10


def test_what_forward_costs_is_counted_and_predicted():
    solved = graph(Forward(), optimizers["momentum"][0], 5)
    _, metrics = solved.step(solved.init())
    assert (metrics.gradients, metrics.products) == (5 + 5 + 1, 5 * 4)
    assert tuple(solved.cost(1)) == (metrics.gradients, metrics.products, 1)


@pytest.mark.parametrize("samples", [None, 4, 9])
def test_all_directions_give_the_derivative_to_second_order_in_the_radius(samples):
    right = graph(Unroll(), optimizers["momentum"][0], 4)
    state = right.init()
    errors = [
        relative_error(
            graph(ZerothOrder(samples=samples, radius=radius), optimizers["momentum"][0], 4).hypergradient("u", state),
            right.hypergradient("u", state),
        )
        for radius in (1e-2, 1e-3)
    ]
    assert errors[0] <= 1e-3
    assert errors[1] <= 0.02 * errors[0]


def test_a_few_directions_give_it_in_the_mean():
    """Each seed has its own directions. The error of the mean of N falls as √((m/n − 1)/N) predicts."""
    right = graph(Unroll(), optimizers["momentum"][0], 2)
    method = graph(ZerothOrder(samples=2, radius=1e-4), optimizers["momentum"][0], 2)
    expected = right.hypergradient("u", right.init())
    found = [method.hypergradient("u", method.init(seed=seed)) for seed in range(400)]
    assert not torch.equal(found[0]["penalties"], found[1]["penalties"])
    mean = {name: torch.stack([each[name] for each in found]).mean(0) for name in expected}
    assert relative_error(mean, expected) <= 3 * (1 / 400) ** 0.5


def test_it_needs_no_derivative_in_what_is_read():
    """w follows round(10u)/10, whose derivative is 0: autodiff finds no way, differences find the slope."""

    def levels(method: AbstractHypergradient) -> list[mlo.Level]:
        def follow(values: Any, batch: Any) -> Tensor:
            with torch.no_grad():
                target = (10 * values["u"]).round() / 10
            return 0.5 * (values["w"] - target).square().sum()

        rule = mlo.optimizer.SGD(learning_rate=1.0)
        return [
            mlo.Level(
                "w",
                objective=follow,
                variables=torch.zeros(2, dtype=torch.float64),
                given=("u",),
                optimizer=rule,
                hypergradient=method,
            ),
            mlo.Level(
                "u",
                objective=lambda values, _: (values["w"] * torch.tensor([1.0, 2.0])).sum(),
                variables=torch.tensor([0.33, 0.61], dtype=torch.float64),
                subject_to=("w",),
                optimizer=rule,
            ),
        ]

    compared = mlo.Graph(levels(ZerothOrder(radius=0.5)))
    compared.probe(compared.init())
    found = compared.hypergradient("u", compared.init())
    assert relative_error(found, torch.tensor([1.0, 2.0], dtype=torch.float64)) <= 1e-12
    differentiated = mlo.Graph(levels(Exact()))
    with pytest.raises(mlo.GraphError, match="does not reach back"):
        differentiated.hypergradient("u", differentiated.init())


def test_choices_are_made_anew_from_the_same_uniforms():
    """k ~ Bernoulli(σ(u)), a stored uniform a sample: the slope of the mean choice is that of σ, and no draw changes."""
    count = 20_000

    def choose(values: Any, batch: Any) -> Tensor:
        drawn = values.once("k", lambda: (torch.rand(count, dtype=torch.float64) < values["u"].sigmoid()).double())
        return 0.5 * (values["w"] - drawn.mean()).square()

    rule = mlo.optimizer.SGD(learning_rate=1.0)
    u = torch.tensor(0.4, dtype=torch.float64)
    solved = mlo.Graph(
        [
            mlo.Level(
                "w",
                objective=choose,
                variables=torch.tensor(0.0, dtype=torch.float64),
                given=("u",),
                optimizer=rule,
                hypergradient=ZerothOrder(radius=0.5),
            ),
            mlo.Level("u", objective=lambda values, _: values["w"], variables=u, subject_to=("w",), optimizer=rule),
        ]
    )
    found = [solved.hypergradient("u", solved.init(seed=3)) for _ in range(2)]
    assert torch.equal(*found)
    slope = u.sigmoid() * (1 - u.sigmoid())
    assert abs(found[0] - slope) <= 0.02


def test_what_it_costs_is_counted_and_predicted():
    solved = graph(ZerothOrder(samples=2), optimizers["momentum"][0], 5)
    _, metrics = solved.step(solved.init())
    assert (metrics.gradients, metrics.products) == (5 + 1 + 2 * 2 * 5, 0)
    assert tuple(solved.cost(1)) == (metrics.gradients, metrics.products, 1)


@pytest.mark.parametrize(
    ("lower", "middle", "message"),
    [
        (
            Forward(),
            Unroll(),
            "level 'x', hypergradient: tangents that are carried along cannot be differentiated again",
        ),
        (
            ZerothOrder(),
            Unroll(),
            "level 'x', hypergradient: responses that are only compared cannot be differentiated",
        ),
        (Unroll(), Forward(), "level 'y', hypergradient: its tangents follow the second derivatives of one objective"),
    ],
    ids=str,
)
def test_where_they_cannot_stand_in_a_nest(lower, middle, message):
    def level(name: str, *, method: Any = None, **fields: Any) -> mlo.Level:
        return mlo.Level(
            name,
            objective=lambda values, _: sum(values[each].sum() for each in values).square(),
            variables=torch.ones(2),
            optimizer=mlo.optimizer.SGD(learning_rate=0.1),
            hypergradient=method or Unroll(),
            **fields,
        )

    levels = [
        level("x", given=("y", "z"), method=lower),
        level("y", given=("z",), subject_to=("x",), method=middle),
        level("z", subject_to=("y",)),
    ]
    with pytest.raises(mlo.GraphError, match=re.escape(message)):
        mlo.Graph(levels)


@pytest.mark.parametrize(("options", "message"), [({"samples": 0}, "samples"), ({"radius": 0.0}, "radius")])
def test_meaningless_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ZerothOrder(**options)

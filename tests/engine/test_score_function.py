"""`mlo.score_function` against exact sums over all outcomes: values, first and second derivatives, pulled back responses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from helpers import normal, relative_error
from torch import Tensor

import mlo

CHOICES = 3
SIZE = 4
TABLE, DRIFT = normal(CHOICES, SIZE, seed=1), normal(CHOICES, SIZE, SIZE, seed=2)


def log_probabilities(u: Tensor) -> Tensor:
    """log p(k; u), [3]."""
    return (TABLE @ u + 0.3 * u.square().sum() * torch.arange(CHOICES)).log_softmax(0)


def loss(k: int, u: Tensor) -> Tensor:
    """L(k, u), which depends on u by itself too."""
    return 2.0 + (DRIFT[k] @ u).tanh().sum() + 0.5 * k * u.sum()


def baseline(u: Tensor) -> Tensor:
    """Of no choice."""
    return 1.5 + u.sin().sum()


def derivatives(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value, the gradient and the Hessian."""
    u = at.clone().requires_grad_()
    value = function(u)
    (gradient,) = torch.autograd.grad(value, u, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(each, u, retain_graph=True)[0] for each in gradient])
    return value.detach(), gradient.detach(), hessian


BASELINES = {
    "none": lambda u: 0.0,
    "a number": lambda u: 1.7,
    "a constant": lambda u: baseline(u).detach(),
    "of variables": baseline,
}


@pytest.mark.parametrize("of", BASELINES.values(), ids=BASELINES)
def test_derivatives_are_unbiased_to_second_order(of):
    u = normal(SIZE, seed=3)
    weights = log_probabilities(u).exp()
    outcomes = []
    for k in range(CHOICES):
        found = derivatives(lambda u, k=k: mlo.score_function(loss(k, u), log_probabilities(u)[k], baseline=of(u)), u)
        assert torch.equal(found[0], loss(k, u))
        outcomes.append(found)
    exact = derivatives(lambda u: sum(log_probabilities(u)[k].exp() * loss(k, u) for k in range(CHOICES)), u)
    for order in range(3):
        mean = sum(weight * outcome[order] for weight, outcome in zip(weights, outcomes, strict=True))
        assert relative_error(mean, exact[order]) < 1e-12
    single = max(relative_error(outcome[1], exact[1]) for outcome in outcomes)
    assert single > 0.1, "one outcome alone is not the expectation"


def test_the_third_derivative_is_unbiased_too():
    u, direction = normal(SIZE, seed=3), normal(SIZE, seed=4)

    def third(function: Callable[[Tensor], Tensor]) -> Tensor:
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = function(u + t * direction)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        return value.detach()

    weights = log_probabilities(u).exp()
    each = [
        third(lambda u, k=k: mlo.score_function(loss(k, u), log_probabilities(u)[k], baseline=baseline(u)))
        for k in range(CHOICES)
    ]
    exact = third(lambda u: sum(log_probabilities(u)[k].exp() * loss(k, u) for k in range(CHOICES)))
    assert relative_error(sum(w * one for w, one in zip(weights, each, strict=True)), exact) < 1e-11


def test_choices_made_one_after_another_are_summed():
    """k ~ p(·; u), then j ~ p(·; u + k): a loss of both rests on the logarithm of both."""
    u = normal(SIZE, seed=5)

    def both(k: int, j: int, u: Tensor) -> Tensor:
        return log_probabilities(u)[k] + log_probabilities(u + k)[j]

    pairs = list(product(range(CHOICES), repeat=2))
    exact = derivatives(lambda u: sum(both(k, j, u).exp() * loss(k, u) * loss(j, u).cos() for k, j in pairs), u)
    outcomes = [
        derivatives(
            lambda u, k=k, j=j: mlo.score_function(loss(k, u) * loss(j, u).cos(), both(k, j, u), baseline=1.0), u
        )
        for k, j in pairs
    ]
    weights = [both(k, j, u).exp() for k, j in pairs]
    for order in range(3):
        mean = sum(weight * outcome[order] for weight, outcome in zip(weights, outcomes, strict=True))
        assert relative_error(mean, exact[order]) < 1e-12


def test_independent_choices_may_take_each_other_for_a_baseline():
    """The mean of the other losses leaves every derivative unbiased, to second order, and takes variance away."""
    u, several = normal(SIZE, seed=6), 3

    def mean_loss(outcome: tuple[int, ...], u: Tensor, *, others: bool) -> Tensor:
        losses = torch.stack([loss(k, u) * (1 + 0.1 * m) for m, k in enumerate(outcome)])
        rest = (losses.sum() - losses) / (several - 1) if others else 0.0
        return mlo.score_function(losses, log_probabilities(u)[list(outcome)], baseline=rest).mean()

    outcomes = list(product(range(CHOICES), repeat=several))
    weights = torch.stack([log_probabilities(u)[list(each)].sum().exp() for each in outcomes])

    def expected(u: Tensor) -> Tensor:
        p = log_probabilities(u).exp()
        return sum(p[k] * loss(k, u) * (1 + 0.1 * m) for k in range(CHOICES) for m in range(several)) / several

    exact = derivatives(expected, u)
    variances = []
    for others in (False, True):
        found = [derivatives(lambda u, o=o, others=others: mean_loss(o, u, others=others), u) for o in outcomes]
        for order in range(3):
            mean = sum(weight * each[order] for weight, each in zip(weights, found, strict=True))
            assert relative_error(mean, exact[order]) < 1e-12
        variances.append(sum(w * (each[1] - exact[1]).square().sum() for w, each in zip(weights, found, strict=True)))
    assert variances[1] < 0.9 * variances[0]


def test_under_transforms():
    u = normal(SIZE, seed=7)
    us = normal(5, SIZE, seed=8)

    def surrogate(u: Tensor) -> Tensor:
        return mlo.score_function(loss(1, u), log_probabilities(u)[1], baseline=baseline(u))

    _, gradient, hessian = derivatives(surrogate, u)
    _, pull = torch.func.vjp(surrogate, u)
    assert relative_error(pull(torch.ones((), dtype=torch.float64))[0], gradient) < 1e-14
    twice = torch.func.jacrev(lambda u: torch.func.vjp(surrogate, u)[1](torch.ones((), dtype=torch.float64))[0])
    assert relative_error(twice(u), hessian) < 1e-12
    together = torch.func.vmap(torch.func.jacrev(surrogate))(us)
    assert relative_error(together, torch.stack([derivatives(surrogate, each)[1] for each in us])) < 1e-12


# Inside a level: w minimises E_k[½ wᵀHw − wᵀt_k], k ~ p(u). The Hessian does not depend on k.

ROOT = normal(SIZE, SIZE, seed=10)
HESSIAN = ROOT @ ROOT.T / SIZE + torch.eye(SIZE, dtype=torch.float64)
TARGETS, GOAL, START = normal(CHOICES, SIZE, seed=11), normal(SIZE, seed=12), normal(SIZE, seed=13)
RATE = 0.2


def lower(w: Tensor, k: int) -> Tensor:
    return 0.5 * w @ HESSIAN @ w - w @ TARGETS[k]


def graph_of(method: Any, of: Any, *, steps: int = 1) -> mlo.Graph:
    def objective(values: Any, batch: Any) -> Tensor:
        k = values.once("k", lambda: batch)
        w, log_p = values["w"], log_probabilities(values["u"])
        return mlo.score_function(lower(w, k), log_p[k], baseline=of(w))

    return mlo.Graph(
        [
            mlo.Level(
                "w",
                objective=objective,
                variables=START,
                given=("u",),
                optimizer=mlo.optimizer.SGD(learning_rate=RATE),
                hypergradient=method,
                steps=steps,
            ),
            mlo.Level(
                "u",
                objective=lambda values, batch: values["w"] @ GOAL,
                variables=normal(SIZE, seed=3),
                subject_to=("w",),
                optimizer=mlo.optimizer.SGD(learning_rate=0.1),
            ),
        ]
    )


METHODS = {
    "unroll": (mlo.hypergradient.Unroll(replay=False), "step", 1e-12),
    "replayed": (mlo.hypergradient.Unroll(replay=True), "step", 1e-12),
    "finite differences": (mlo.hypergradient.FiniteDifference(radius=1e-4), "step", 1e-6),
    "exact": (mlo.hypergradient.Exact(), "solution", 1e-12),
    "conjugate gradients": (mlo.hypergradient.ConjugateGradient(iterations=2 * SIZE), "solution", 1e-10),
}
OWN = {"none": lambda w: 0.0, "of the level's own variables": lambda w: 0.5 * w @ HESSIAN @ w - w @ TARGETS.mean(0)}


@pytest.mark.parametrize("of", OWN.values(), ids=OWN)
@pytest.mark.parametrize(("method", "answer", "tolerance"), METHODS.values(), ids=METHODS)
def test_a_pulled_back_response_is_unbiased(method, answer, tolerance, of):
    """(∂²f/∂w∂u)ᵀ q at a given w, averaged over k, is that of E[f], whose only u stands in Σ p_k(u) t_k."""
    graph = graph_of(method, of, steps=1 if answer == "step" else 0)
    state = graph.init()
    u = state.values["u"].clone().requires_grad_()
    targets = log_probabilities(u).exp() @ TARGETS  # in −∂E[f]/∂w
    q = RATE * GOAL if answer == "step" else torch.linalg.solve(HESSIAN, GOAL)
    right = torch.autograd.grad(targets @ q, u)[0]
    weights = log_probabilities(state.values["u"]).exp()
    found = [graph.hypergradient("u", state, {"w": torch.tensor(k)}) for k in range(CHOICES)]
    assert relative_error(sum(w * one for w, one in zip(weights, found, strict=True)), right) < tolerance


@pytest.mark.parametrize("of", OWN.values(), ids=OWN)
def test_the_levels_own_step_is_that_of_the_loss_alone(of):
    graph = graph_of(mlo.hypergradient.Unroll(), of)
    after = graph.step(graph.init(), {"w": torch.tensor(1)})[0].values["w"]
    assert relative_error(after, START - RATE * (HESSIAN @ START - TARGETS[1])) < 1e-14


def test_a_baseline_of_the_levels_own_variables_takes_variance_from_the_hypergradient():
    spreads = []
    for of in OWN.values():
        graph = graph_of(mlo.hypergradient.Exact(), of, steps=0)
        state = graph.init()
        weights = log_probabilities(state.values["u"]).exp()
        found = [graph.hypergradient("u", state, {"w": torch.tensor(k)}) for k in range(CHOICES)]
        mean = sum(w * one for w, one in zip(weights, found, strict=True))
        spreads.append(sum(w * (one - mean).square().sum() for w, one in zip(weights, found, strict=True)))
    assert spreads[1] < 0.9 * spreads[0]


@pytest.mark.parametrize(
    ("loss", "log_probability", "baseline", "message"),
    [
        (torch.zeros(()), torch.zeros(3), 0.0, r"log_probability has shape \(3,\); expected one number$"),
        (
            torch.zeros(3),
            torch.zeros(2),
            0.0,
            r"log_probability has shape \(2,\); expected one number or the shape of the loss",
        ),
        (
            torch.zeros(3),
            torch.zeros(3),
            torch.zeros(3, 1),
            r"baseline has shape \(3, 1\); expected one number or the shape",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(loss, log_probability, baseline, message):
    with pytest.raises(mlo.UserError, match=message):
        mlo.score_function(loss, log_probability, baseline=baseline)

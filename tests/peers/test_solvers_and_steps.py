"""What other libraries get wrong in one method, or in one optimizer: conjugate gradients, differences, unrolled steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    HandUpdate,
    Memory,
    Tensors,
    adam_by_hand,
    memory_of,
    named,
    no_memory,
    normal,
    optimizers,
    relative_error,
    respond_by_hand,
    same_bits,
    sgd_by_hand,
)
from torch import Tensor

import mlo
from mlo.cli import main
from mlo.hypergradient import ConjugateGradient, FiniteDifference, Unroll
from mlo.optimizer import SGD, Adam, initial, updated

PENALTY = Path(__file__).parent.parent.parent / "graphs" / "penalty.yaml"


def level(objective: Any, start: Any, optimizer: Any, steps: int, **method: Any) -> mlo.Level:
    return mlo.Level(
        "w", objective=objective, variables=start, given=("u",), optimizer=optimizer, steps=steps, **method
    )


def below(lower: mlo.Level, objective: Any, u: Tensor) -> mlo.Graph:
    upper = mlo.Level("u", objective=objective, variables=u, subject_to=("w",), optimizer=SGD(learning_rate=0.1))
    return mlo.Graph([lower, upper])


# A quadratic: f = s(½wᵀHw − wᵀBu), F = ½‖w − t‖².

SIZE = 6
B, T, U = normal(SIZE, SIZE, seed=1), normal(SIZE, seed=2), normal(SIZE, seed=3)


def conditioned(condition: float) -> Tensor:
    """Eigenvalues from 1/condition to 1."""
    vectors, _ = torch.linalg.qr(normal(SIZE, SIZE, seed=4))
    return vectors @ torch.linspace(1 / condition, 1, SIZE).diag() @ vectors.T


def quadratic(hessian: Tensor, *, scale: float = 1.0, rate: float = 0.5, steps: int = 0, **method: Any) -> mlo.Graph:
    def inner(values: Any, batch: Any) -> Tensor:
        w = values["w"]
        return scale * (0.5 * w @ hessian @ w - w @ B @ values["u"])

    def outer(values: Any, batch: Any) -> Tensor:
        return 0.5 * (values["w"] - T).square().sum()

    return below(level(inner, torch.zeros(SIZE), SGD(learning_rate=rate), steps, **method), outer, U)


def solved(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """w*, and dF/du there: BᵀH⁻¹(w* − t)."""
    w = torch.linalg.solve(hessian, B @ U)
    return w, B.T @ torch.linalg.solve(hessian, w - T)


def test_the_defaults_on_a_quadratic_of_condition_10():
    """No method is named: the derivative of the steps as they were taken; enough of them, and it is the exact one."""
    h = conditioned(10)
    _, exact = solved(h)
    errors = []
    for steps in (1, 10, 100, 400):
        graph = quadratic(h, rate=0.9, steps=steps)
        p = torch.eye(SIZE) - 0.9 * h
        s = (torch.eye(SIZE) - torch.linalg.matrix_power(p, steps)) @ torch.linalg.inv(h)
        found = graph.hypergradient("u", graph.init())
        assert relative_error(found, B.T @ s.T @ (s @ B @ U - T)) <= 1e-12
        errors.append(relative_error(found, exact))
    assert errors[-1] <= 1e-10


def test_conjugate_gradients_with_their_default_tolerance_on_a_quadratic_of_condition_10():
    h = conditioned(10)
    w, exact = solved(h)
    graph = quadratic(h, hypergradient=ConjugateGradient(iterations=SIZE))
    assert relative_error(graph.hypergradient("u", graph.init(values={"w": w})), exact) <= 1e-10


@pytest.mark.parametrize("rate", [1e-3, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_conjugate_gradients_have_no_step_that_could_be_chosen_wrong(scale, rate):
    """The solution of sf does not depend on s, nor its derivative; nor on the optimizer's learning rate."""
    h = conditioned(10)
    w, exact = solved(h)
    graph = quadratic(h, scale=scale, rate=rate, hypergradient=ConjugateGradient(iterations=20))
    assert relative_error(graph.hypergradient("u", graph.init(values={"w": w})), exact) <= 1e-10


@pytest.mark.parametrize("tolerance", [None, 0.0])
@pytest.mark.parametrize("curvature", [1.0, 0.3, 7.0])
def test_conjugate_gradients_on_a_multiple_of_the_identity(curvature, tolerance):
    """One iteration solves it. With a tolerance of zero they go on where the residual is zero: neither zero nor NaN."""
    hessian = curvature * torch.eye(SIZE)
    w, exact = solved(hessian)
    method = ConjugateGradient(iterations=200, tolerance=tolerance)
    graph = quadratic(hessian, hypergradient=method)
    state = graph.init(values={"w": w})
    found = graph.hypergradient("u", state)
    assert relative_error(found, exact) <= 1e-14
    assert graph.step(state)[1].reports["u", "w"]["negative_curvature"] == 0
    once = quadratic(hessian, hypergradient=ConjugateGradient(iterations=1))
    assert relative_error(found, once.hypergradient("u", state)) <= 1e-14


@pytest.mark.parametrize("tolerance", [None, 0.0])
def test_conjugate_gradients_go_on_past_convergence_without_nan(tolerance):
    for condition in (2.0, 10.0, 1e4):
        h = conditioned(condition)
        w, exact = solved(h)
        graph = quadratic(h, hypergradient=ConjugateGradient(iterations=300, tolerance=tolerance))
        state = graph.init(values={"w": w})
        assert relative_error(graph.hypergradient("u", state), exact) <= 1e-14 * condition * 10
        report = graph.step(state)[1].reports["u", "w"]
        assert report["negative_curvature"] == 0
        assert report["residual"] <= 1e-12


@pytest.mark.parametrize("tolerance", [None, 0.0])
def test_conjugate_gradients_with_nothing_to_solve(tolerance):
    """A response at the upper level's own optimum has a zero cotangent: the residual is zero before the first iteration."""
    h = conditioned(10)
    graph = quadratic(h, hypergradient=ConjugateGradient(iterations=20, tolerance=tolerance))
    state = graph.init(values={"w": T})
    assert same_bits(graph.hypergradient("u", state), torch.zeros(SIZE))
    report = graph.step(state)[1].reports["u", "w"]
    assert report["residual"] == report["negative_curvature"] == report["iterations"] == 0


def test_central_differences_are_right_to_the_square_of_their_radius():
    """Four times closer at half the radius, against the recorded step: a bound, where a loose tolerance would be a guess."""

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"] * values["u"]).exp().sum() + values["w"].square().sum()

    def outer(values: Any, batch: Any) -> Tensor:
        return (values["w"] - 1).square().sum()

    def pulled(method: Any) -> Tensor:
        graph = below(level(inner, normal(4, seed=5), Adam(learning_rate=0.05), 3, hypergradient=method), outer, U[:4])
        return graph.hypergradient("u", graph.init())

    right = pulled(Unroll(last=1))
    errors = [(pulled(FiniteDifference(radius=radius)) - right).norm() for radius in (0.04, 0.02, 0.01)]
    for coarse, fine in pairwise(errors):
        torch.testing.assert_close(coarse / fine, torch.tensor(4.0), rtol=1e-2, atol=0)
    assert errors[-1] <= 1e-4 * right.norm()


# Optimizers below: a small tanh network with sample weights above it.

X, Y, SEEN = normal(8, 3, seed=6), normal(8, seed=7), normal(5, 3, seed=8)
START = {"bias": 0.1 * normal(4, seed=9), "first": 0.7 * normal(3, 4, seed=10), "second": 0.7 * normal(4, seed=11)}
WEIGHTS = normal(8, seed=12)


def predict(w: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ w["first"] + w["bias"]) @ w["second"]


def fit(w: Any, u: Tensor) -> Tensor:
    return ((predict(w, X) - Y).square() * u.sigmoid()).mean() + 1e-2 * w["first"].square().sum()


def judged(w: Any) -> Tensor:
    return (predict(w, SEEN) - 0.3).square().mean()


def networks(optimizer: Any, steps: int, method: Any) -> mlo.Graph:
    lower = level(lambda values, batch: fit(values["w"], values["u"]), START, optimizer, steps, hypergradient=method)
    return below(lower, lambda values, batch: judged(values["w"]), WEIGHTS)


def by_hand(
    update: HandUpdate, steps: int, *, start: Tensors = START, at: Tensor = WEIGHTS, memory: Memory | None = None
) -> tuple[Tensors, Tensor]:
    """Where the loop, written out, ends, and the derivative through all of it."""
    u = at.detach().clone().requires_grad_()
    end = respond_by_hand(lambda w, _: fit(w, u), start, update, steps, memory)
    return end, torch.autograd.grad(judged(end), u)[0]


@pytest.mark.parametrize("method", [Unroll(), Unroll(replay=True)], ids=["recorded", "replayed"])
def test_twenty_steps_of_adam_are_differentiated_as_adam(method):
    """The cosine to autograd through the loop written out is 1, not −0.14; and the size is right too."""
    graph = networks(Adam(learning_rate=0.02), 20, method)
    found, (_, right) = graph.hypergradient("u", graph.init()), by_hand(adam_by_hand(0.02), 20)
    assert abs(torch.cosine_similarity(found, right, dim=0) - 1) <= 1e-10
    assert relative_error(found, right) <= 1e-10


def test_finite_differences_pull_through_adam_and_not_through_plain_descent():
    """The last of twenty steps of Adam, from where the nineteenth ended."""
    graph = networks(Adam(learning_rate=0.02), 20, FiniteDifference(radius=1e-3))
    before = networks(Adam(learning_rate=0.02), 19, Unroll())
    state, _ = before.step(before.init())
    _, right = by_hand(adam_by_hand(0.02), 1, start=dict(state.values["w"]), memory=memory_of(state, "w"))
    found = graph.hypergradient("u", graph.init())
    assert abs(torch.cosine_similarity(found, right, dim=0) - 1) <= 1e-8
    assert relative_error(found, right) <= 1e-4


@pytest.mark.parametrize("name", list(optimizers))
def test_what_an_optimizer_remembers_is_kept_between_iterations(name):
    """Two iterations of three steps are six steps; the second derivative starts from the moments the first one left."""
    rule, update = optimizers[name]
    graph = networks(rule, 3, Unroll())
    state = graph.init()
    middle, _ = graph.step(state)
    after, _ = graph.step(middle)
    count, remembered = memory_of(middle, "w")
    assert count == 3
    memory = count, {**no_memory(START)[1], **remembered}
    end, right = by_hand(update, 3, start=dict(middle.values["w"]), at=middle.values["u"], memory=memory)
    assert relative_error(named(after.values["w"]), {key: tensor.detach() for key, tensor in end.items()}) <= 1e-12
    assert relative_error(graph.hypergradient("u", middle), right) <= 1e-10
    constant = mlo.Graph([graph.levels["w"], mlo.Level("u", variables=WEIGHTS)])
    state = constant.init()
    for _ in range(2):
        state, _ = constant.step(state)
    six, _ = by_hand(update, 6)
    assert relative_error(state.values["w"], {key: tensor.detach() for key, tensor in six.items()}) <= 1e-12


@pytest.mark.parametrize("replay", [False, True])
def test_parameter_groups_are_kept_and_differentiated(replay):
    """Another learning rate for the bias, and momentum for the rest alone."""
    rule = SGD(learning_rate=0.1, momentum=0.9, groups={"bias": {"learning_rate": 0.4, "momentum": 0.0}})
    plain, heavy = sgd_by_hand(0.4), sgd_by_hand(0.1, 0.9)

    def update(w: Tensors, g: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        bias, _ = plain({"bias": w["bias"]}, g, memory)
        rest, memory = heavy({key: w[key] for key in ("first", "second")}, g, memory)
        return {**bias, **rest}, memory

    graph = networks(rule, 5, Unroll(replay=replay))
    state, (end, right) = graph.init(), by_hand(update, 5)
    assert relative_error(graph.hypergradient("u", state), right) <= 1e-12
    assert (
        relative_error(graph.step(state)[0].values["w"], {key: tensor.detach() for key, tensor in end.items()}) <= 1e-12
    )


@pytest.mark.parametrize("name", list(optimizers))
def test_the_update_of_an_optimizer_is_one_graph_to_the_compiler(name):
    rule = optimizers[name][0]
    gradient = {key: normal(*tensor.shape, seed=13) for key, tensor in START.items()}

    def update(gradient: Tensors, state: Any) -> Tensors:
        return updated(rule, 1, gradient, state, START)[0]

    torch.compiler.reset()
    compiled: Callable[..., Tensors] = torch.compile(update, fullgraph=True, backend="eager")
    state = initial(rule, START)
    assert same_bits(compiled(gradient, state), update(gradient, state))


# Before the first step.


@pytest.mark.parametrize("written", ["neuman", "{neuman: {terms: 5, step_size: 0.1}}", "conjugate_gradients"])
def test_a_misspelt_method_is_found_when_a_graph_is_checked(written, capsys, monkeypatch):
    monkeypatch.setattr(mlo.Graph, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(SystemExit) as exited:
        main(["check", str(PENALTY), f"levels.weights.hypergradient={written}"])
    assert exited.value.code == 2
    said = capsys.readouterr().err
    right = "neumann" if "neuman" in written else "conjugate_gradient"
    assert "levels.weights.hypergradient" in said
    assert f"Did you mean '{right}'?" in said

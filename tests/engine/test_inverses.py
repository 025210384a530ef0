"""Nyström approximations, Neumann series that choose their step size and their end, and the optimizer's preconditioner."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from helpers import flat, memory_of, named, no_memory, normal, optimizers, relative_error, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import DESCENT, SHAPES, SIZE, Quadratics
from torch import Tensor

import mlo
from mlo._linearisation import Linearisation
from mlo.hypergradient import (
    AbstractInverse,
    AbstractLinearisation,
    CentralDifference,
    ConjugateGradient,
    Exact,
    FirstOrder,
    Implicit,
    Neumann,
    Nystrom,
    Preconditioned,
    Unroll,
)
from mlo.hypergradient._neumann import SAFETY

ROUNDING = 1e-12


def spectral(*eigenvalues: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    vectors, _ = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))
    return vectors @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ vectors.T


@dataclass(frozen=True)
class Drawing(AbstractInverse):
    """`method`, and the first normal numbers of every linearisation it is used at."""

    method: AbstractInverse
    drawn: list[Tensor] = field(default_factory=list, compare=False)

    def products(self, size: int) -> int:
        return self.method.products(size)

    def solve(self, at: AbstractLinearisation, cotangent: Any) -> Any:
        self.drawn.append(torch.stack([torch.as_tensor(at.normal(index)) for index in range(10)], dim=1))
        return self.method.solve(at, cotangent)


def level(hessian: Tensor, method: Any, target: Tensor, steps: int = 0, **changes: Any) -> mlo.Graph:
    """f = ½wᵀHw − wᵀu and F = wᵀ · target: λ = target, and the hypergradient is q."""

    def inner(values: Any, batch: Any) -> Tensor:
        return 0.5 * values["w"] @ hessian @ values["w"] - values["w"] @ values["u"]

    start = torch.zeros(len(hessian))
    lower = mlo.Level(
        "w", objective=inner, variables=start, given=("u",), optimizer=DESCENT, steps=steps, hypergradient=method
    )
    upper = mlo.Level(
        "u", objective=lambda values, batch: values["w"] @ target, variables=start, subject_to=("w",), optimizer=DESCENT
    )
    return mlo.Graph([replace(lower, **changes), upper])


def reported(graph: mlo.Graph, state: mlo.State | None = None) -> dict[str, float]:
    _, metrics = graph.step(state or graph.init())
    return {name: value.item() for name, value in metrics.reports["u", "w"].items()}


# Nyström


@settings(max_examples=25)
@given(st.integers(1, 7), st.sampled_from([1e-2, 0.1, 1.0]), st.integers(0, 1000))
def test_nystrom_is_the_woodbury_formula_for_its_random_directions(rank, damping, seed):
    h = spectral(1.0, 0.7, 0.3, 0.1, 0.05, 0.01, seed=seed)
    method = Drawing(Nystrom(rank=rank, damping=damping))
    graph = level(h, method, normal(6, seed=seed))
    found = graph.hypergradient("u", graph.init(seed=seed))
    omega = method.drawn[0][:, : min(rank, 6)]
    low_rank = h @ omega @ torch.linalg.solve(omega.T @ h @ omega, omega.T @ h)
    right = torch.linalg.solve(low_rank + damping * torch.eye(6), normal(6, seed=seed))
    assert relative_error(found, right) <= 1e-7  # the directions as they were drawn, which are not orthogonal


@settings(max_examples=25)
@given(st.integers(1, 5), st.sampled_from([1e-3, 1e-2, 1.0]), st.integers(0, 1000))
def test_nystrom_is_symmetric_and_obeys_its_bound(rank, damping, seed):
    h = spectral(1.0, 0.7, 0.3, 0.1, 0.05, 0.01, seed=seed)
    method = Drawing(Nystrom(rank=rank, damping=damping))
    columns = []
    for unit in torch.eye(6):
        graph = level(h, method, unit)
        columns.append(graph.hypergradient("u", graph.init(seed=seed)))
    inverse, eye = torch.stack(columns, dim=1), torch.eye(6)
    assert (inverse - inverse.T).norm() <= 1e-9 * inverse.norm()
    missed = h - (torch.linalg.inv(inverse) - damping * eye)  # E = H − H̃
    size = torch.linalg.matrix_norm(missed, 2)
    error = torch.linalg.eigvalsh(inverse - torch.linalg.inv(h + damping * eye))
    assert error[0] >= -1e-9 / damping
    assert error[-1] <= size / (damping * (damping + size)) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("rank", [3, 6, 20])
def test_nystrom_is_exact_where_it_reaches_the_rank_of_the_hessian(rank, damping):
    eigenvalues = (2.0, 1.0, 0.5) if rank == 3 else (2.0, 1.0, 0.5, 0.1, 0.01, 1e-4)
    h = spectral(*eigenvalues, *([0.0] * (6 - len(eigenvalues))), seed=1)
    target = h @ normal(6, seed=2)  # in the range of H, where the damping does not decide alone
    found = level(h, Nystrom(rank=rank, damping=damping), target)
    exact = level(h, Exact(damping=damping), target)
    assert relative_error(found.hypergradient("u", found.init()), exact.hypergradient("u", exact.init())) <= 1e-8
    _, metrics = found.step(found.init())
    assert metrics.products == min(rank, 6) + 1 == found.cost(1).products
    torch.testing.assert_close(metrics.reports["u", "w"]["lambda_max"], torch.tensor(2.0), rtol=1e-9, atol=0)
    assert metrics.reports["u", "w"]["negative_curvature"] == 0


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_nystrom_reaches_the_closed_form_on_graphs_of_several_levels(shape):
    problem = Quadratics(shape, 10.0, 4)
    graph = mlo.Graph(problem.levels(Nystrom(rank=SIZE, damping=1e-10), 0, DESCENT))
    values, gradient = problem.solution()
    assert relative_error(graph.hypergradient("u", graph.init(values=values)), gradient) <= 1e-8


def test_nystrom_of_an_indefinite_hessian_is_right_at_full_rank_and_says_so():
    h = spectral(1.0, 0.5, -0.4)
    graph = level(h, Nystrom(rank=3, damping=0.1), normal(3, seed=1))
    right = torch.linalg.solve(h + 0.1 * torch.eye(3), normal(3, seed=1))
    assert relative_error(graph.hypergradient("u", graph.init()), right) <= 1e-10
    assert reported(graph)["negative_curvature"] == 1


def test_nystrom_of_no_curvature_at_all_divides_by_the_damping():
    graph = level(torch.zeros(4, 4), Nystrom(rank=2, damping=0.5), normal(4, seed=1))
    assert relative_error(graph.hypergradient("u", graph.init()), 2 * normal(4, seed=1)) <= ROUNDING


# Neumann


def estimated(h: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """λ̂ and v after power iterations, written out."""
    v, size = start / start.norm(), torch.tensor(0.0)
    for _ in range(iterations):
        image = h @ v
        size, v = image.norm(), image / image.norm()
    return size, v


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("terms", [0, 1, 6])
@pytest.mark.parametrize("power", [1, 3, 8])
def test_auto_is_the_series_with_a_step_size_from_power_iterations_that_go_on(terms, power, damping):
    h, target, eye = spectral(3.0, 2.0, 1.0, 0.2, 0.1), normal(5, seed=1), torch.eye(5)
    method = Drawing(Neumann(terms=terms, step_size="auto", power_iterations=power, damping=damping))
    graph = level(h, method, target)
    state, v = graph.init(), None
    for iteration in range(4):
        counted = power if iteration == 0 else 1
        found = graph.hypergradient("u", state)
        size, v = estimated(h + damping * eye, method.drawn[-1][:, 0] if v is None else v, counted)
        alpha = SAFETY / size
        q = alpha * sum(
            torch.linalg.matrix_power(eye - alpha * (h + damping * eye), k) @ target for k in range(terms + 1)
        )
        assert relative_error(found, q) <= 1e-10
        state, metrics = graph.step(state)
        report = metrics.reports["u", "w"]
        torch.testing.assert_close(report["step_size"], alpha, rtol=1e-10, atol=0)
        assert metrics.products == counted + terms + 1
        assert size * (1 - 1e-12) <= report["lambda_max"] <= (3.0 + damping) * (1 + 1e-12)
        assert metrics.products <= graph.cost(1).products == power + terms + 1
    assert relative_error(state.memory["u", "w"]["direction"], v) <= 1e-8


def test_one_power_iteration_an_iteration_finds_the_largest_eigenvalue():
    graph = level(
        spectral(3.0, 2.0, 1.0, 0.2, 0.1), Neumann(terms=0, step_size="auto", power_iterations=1), torch.ones(5)
    )
    state = graph.init()
    for _ in range(40):
        state, metrics = graph.step(state)
    torch.testing.assert_close(metrics.reports["u", "w"]["lambda_max"], torch.tensor(3.0), rtol=1e-8, atol=0)


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("tolerance", [None, 1e-10])
def test_auto_reaches_the_closed_form(shape, tolerance):
    problem = Quadratics(shape, 10.0, 4)
    graph = mlo.Graph(problem.levels(Neumann(terms=400, step_size="auto", tolerance=tolerance), 0, DESCENT))
    values, gradient = problem.solution()
    assert relative_error(graph.hypergradient("u", graph.init(values=values)), gradient) <= 1e-8


@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-6])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_series_stops_at_the_first_residual_below_its_tolerance(tolerance, damping):
    h, target, eye = spectral(1.0, 0.5, 0.2), normal(3, seed=1), torch.eye(3)
    graph = level(h, Neumann(terms=200, step_size=0.9, damping=damping, tolerance=tolerance), target)
    factor = eye - 0.9 * (h + damping * eye)
    residuals = [torch.linalg.matrix_power(factor, k) @ target / target.norm() for k in range(201)]
    first = next(k for k, residual in enumerate(residuals) if residual.norm() <= tolerance)
    report = reported(graph)
    assert report["terms"] == first
    assert report["residual"] == pytest.approx(residuals[first].norm().item(), rel=1e-9)
    q = 0.9 * target.norm() * sum(residuals[: first + 1])
    assert relative_error(graph.hypergradient("u", graph.init()), q) <= 1e-10
    _, metrics = graph.step(graph.init())
    assert metrics.products == first + 1 < graph.cost(1).products == 201


def test_a_tolerance_stops_every_lane_of_a_transform_by_itself():
    problem = Quadratics("diamond", 10.0, 9)
    graph = mlo.Graph(problem.levels(Neumann(terms=300, step_size="auto", tolerance=1e-3), 2, DESCENT))
    state, rows = graph.init(), normal(3, SIZE, seed=77)

    def hypergradient(u: Tensor) -> Any:
        return graph.hypergradient("u", replace(state, values={**state.values, "u": u}))

    together = torch.func.vmap(hypergradient)(rows)
    for row, alone in zip(together, rows, strict=True):
        assert relative_error(row, hypergradient(alone)) <= 1e-9


def test_a_given_step_size_measures_curvature_without_a_product():
    h, target = spectral(1.0, 0.5, 0.1), normal(3, seed=1)
    for terms in (1, 2, 9):
        report = reported(level(h, Neumann(terms=terms, step_size=0.7), target))
        factor = torch.eye(3) - 0.7 * h
        seen = [torch.linalg.matrix_power(factor, k) @ target for k in (0, terms - 1)]
        assert report["lambda_max"] == pytest.approx(max(((h @ t).norm() / t.norm()).item() for t in seen), rel=1e-10)
        assert report["lambda_min"] == pytest.approx(min((t @ h @ t / (t @ t)).item() for t in seen), rel=1e-10)
        assert report["negative_curvature"] == 0
        assert (report["step_size"], report["terms"]) == (0.7, terms)
    assert "lambda_max" not in reported(level(h, Neumann(terms=0, step_size=0.7), target))
    assert reported(level(h, Neumann(terms=0, step_size=0.7), target))["residual"] == 1


@pytest.mark.parametrize("step_size", [2.5, "auto"])
def test_a_series_that_diverges_measures_the_largest_eigenvalue(step_size):
    report = reported(level(spectral(1.0, 0.5, 0.1), Neumann(terms=30, step_size=step_size), normal(3, seed=1)))
    assert report["lambda_max"] == pytest.approx(1.0, rel=1e-3)
    assert (report["residual"] > 1) == (step_size == 2.5)


@pytest.mark.parametrize("step_size", [0.5, "auto"])
def test_a_series_along_negative_curvature_says_so(step_size):
    report = reported(level(spectral(1.0, 0.5, -0.3), Neumann(terms=30, step_size=step_size), normal(3, seed=1)))
    assert report["negative_curvature"] == 1
    assert report["lambda_min"] == pytest.approx(-0.3, rel=1e-3)
    assert report["residual"] > 1


def test_auto_of_no_curvature_at_all_is_loud_and_gives_zero_for_zero():
    flat_graph = level(torch.zeros(3, 3), Neumann(terms=2, step_size="auto"), torch.ones(3))
    with pytest.raises(mlo.NumericalError):
        flat_graph.step(flat_graph.init())
    still = level(torch.zeros(3, 3), Neumann(terms=2, step_size="auto"), torch.zeros(3))
    assert same_bits(still.hypergradient("u", still.init()), torch.zeros(3))


def test_conjugate_gradients_report_rayleigh_quotients_within_the_spectrum():
    h = spectral(2.0, 1.0, 0.5, 0.1)
    report = reported(level(h, ConjugateGradient(iterations=4), normal(4, seed=1)))
    assert 0.1 <= report["lambda_min"] <= report["lambda_max"] <= 2.0
    first = normal(4, seed=1)
    report = reported(level(h, ConjugateGradient(iterations=1, damping=0.5), first))
    assert report["lambda_max"] == report["lambda_min"]
    assert report["lambda_max"] == pytest.approx((first @ h @ first / (first @ first)).item() + 0.5, rel=1e-12)
    assert "lambda_max" not in reported(level(h, ConjugateGradient(iterations=3), torch.zeros(4)))


# The optimizer's preconditioner


@pytest.mark.parametrize("optimizer", [name for name in optimizers if name != "adamw"])
@pytest.mark.parametrize("steps", [1, 4])
def test_preconditioned_is_the_optimizers_own_derivative_at_the_last_step(optimizer, steps):
    """P = −∂w'/∂g by autograd through the update written by hand, at the gradient and the memory of the last step."""
    made, update = optimizers[optimizer]
    problem = Quadratics("two", 20.0, 3)
    graph = mlo.Graph(problem.levels(Preconditioned(scale=1.7), steps, made))
    state = graph.init()
    for _ in range(2):
        state, _ = graph.step(state)
    before = mlo.Graph(problem.levels(Preconditioned(), steps - 1, made)) if steps > 1 else None
    last = before.step(state)[0] if before else state
    w = last.values["a"]
    u = state.values["u"]
    gradient = (problem.h["a"] @ w - problem.c["a"] - problem.b["a", "u"] @ u).requires_grad_()
    count, moments = memory_of(last, "a")
    new, _ = update(named(w), {"": gradient}, (count, no_memory(w)[1] | moments))
    cotangent = (new[""] - problem.t["a"]).detach()
    (pulled,) = torch.autograd.grad(new[""], gradient, cotangent)
    right = problem.b["a", "u"].T @ (-1.7 * pulled)
    assert relative_error(graph.hypergradient("u", state), right) <= 1e-10


@pytest.mark.parametrize("optimizer", [name for name in optimizers if name != "adamw"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_preconditioned_is_the_last_step_unrolled_where_the_cross_derivative_is_constant(optimizer, shape):
    made, _ = optimizers[optimizer]
    problem = Quadratics(shape, 20.0, 3)
    graph, unrolled = (mlo.Graph(problem.levels(method, 3, made)) for method in (Preconditioned(), Unroll(last=1)))
    state = graph.step(graph.init())[0]
    assert relative_error(graph.hypergradient("u", state), unrolled.hypergradient("u", state)) <= 1e-10
    assert graph.cost(1).products == len(SHAPES[shape])


def test_preconditioned_by_sgd_is_first_order_scaled_by_the_learning_rate():
    problem = Quadratics("two", 20.0, 3)
    found, right = (
        mlo.Graph(problem.levels(m, 2, DESCENT)) for m in (Preconditioned(scale=3.0), FirstOrder(scale=1.5))
    )
    assert relative_error(found.hypergradient("u", found.init()), right.hypergradient("u", right.init())) <= ROUNDING


def test_preconditioned_contributes_nothing_without_a_step():
    problem = Quadratics("diamond", 20.0, 3)
    for method in (Preconditioned(), Implicit(inverse=Preconditioned(), cross=CentralDifference())):
        graph = mlo.Graph(problem.levels(method, 0, DESCENT))
        assert same_bits(graph.hypergradient("u", graph.init()), torch.zeros(SIZE))
        _, metrics = graph.step(graph.init())
        assert (metrics.gradients, metrics.products) == (1, 0)


def test_preconditioned_refuses_a_decay_that_belongs_to_no_objective():
    problem = Quadratics("two", 20.0, 3)
    with pytest.raises(mlo.GraphError, match="decoupled weight decay"):
        mlo.Graph(problem.levels(Preconditioned(), 1, mlo.optimizer.AdamW(learning_rate=0.1)))


# All of them


@pytest.mark.parametrize(
    "inverse",
    [
        Nystrom(rank=3, damping=0.1),
        Neumann(terms=5, step_size="auto"),
        Neumann(terms=50, step_size=0.7, tolerance=1e-3),
        ConjugateGradient(iterations=3, warm_start=True),
        Preconditioned(),
    ],
    ids=repr,
)
def test_an_inverse_composes_with_central_differences_and_is_pure(inverse):
    problem = Quadratics("diamond", 20.0, 3)
    slow = mlo.optimizer.SGD(learning_rate=1e-4)
    exact, near = (
        mlo.Graph(
            [replace(each, optimizer=slow) if each.name == "u" else each for each in problem.levels(method, 2, DESCENT)]
        )
        for method in (inverse, Implicit(inverse=inverse, cross=CentralDifference(radius=0.01)))
    )
    state, random = exact.init(), torch.random.get_rng_state()
    for _ in range(3):
        copies = {
            pair: {name: flat(tree).clone() for name, tree in trees.items()} for pair, trees in state.memory.items()
        }
        found = exact.hypergradient("u", state)
        assert same_bits(found, exact.hypergradient("u", state))
        assert relative_error(near.hypergradient("u", state), found) <= 1e-8
        for pair, trees in copies.items():
            assert same_bits(trees, {name: flat(tree) for name, tree in state.memory[pair].items()})
        state, _ = exact.step(state)
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nystrom(rank=0, damping=0.1), "rank must be at least 1, got 0"),
        (lambda: Nystrom(rank=2, damping=0.0), "damping must be positive, got 0.0"),
        (lambda: Nystrom(rank=2, damping=float("nan")), "damping must be positive, got nan"),
        (lambda: Neumann(terms=2, step_size="atuo"), "step_size must be a positive number or 'auto', got 'atuo'"),
        (lambda: Neumann(terms=2, step_size=0.0), "step_size must be positive, got 0.0"),
        (lambda: Neumann(terms=2, step_size="auto", power_iterations=0), "power_iterations must be at least 1, got 0"),
        (lambda: Neumann(terms=2, step_size=0.1, tolerance=-1.0), "tolerance must be at least 0, got -1.0"),
        (lambda: Preconditioned(scale=0.0), "scale must be positive, got 0.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make()


@pytest.mark.parametrize("eigenvalues", [(2.0, 1.0, 0.5, 0.1), (2.0, 1.0, 0.5, -0.1)])
@pytest.mark.parametrize("iterations", [2, 3])
@pytest.mark.parametrize("looks", [True, False])
def test_the_quotients_of_conjugate_gradients_are_those_of_their_directions(
    eigenvalues, iterations, looks, monkeypatch
):
    """Directions of the printed recurrence, each measured by itself; with every number looked at, and with none."""
    if not looks:
        monkeypatch.setattr(Linearisation, "known", lambda self, value: None)
    h, target = spectral(*eigenvalues), normal(4, seed=1)
    residual = direction = target
    quotients, solution = [], torch.zeros(4)
    for _ in range(iterations):
        curvature = direction @ h @ direction
        quotients.append((curvature / (direction @ direction)).item())
        if curvature <= 0:
            break
        step = (residual @ residual) / curvature
        solution = solution + step * direction
        after = residual - step * h @ direction
        direction = after + (after @ after) / (residual @ residual) * direction
        residual = after
    graph = level(h, ConjugateGradient(iterations=iterations), target)
    report = reported(graph)
    assert report["lambda_max"] == pytest.approx(max(quotients), rel=1e-9)
    assert report["lambda_min"] == pytest.approx(min(quotients), rel=1e-9)
    assert report["residual"] == pytest.approx((residual.norm() / target.norm()).item(), rel=1e-9)
    assert report["negative_curvature"] == (min(quotients) <= 0)
    assert relative_error(graph.hypergradient("u", graph.init()), solution) <= 1e-10

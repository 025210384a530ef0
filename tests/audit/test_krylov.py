"""Lanczos' method and minimal residuals against dense linear algebra, and the memory counter against known sizes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import normal
from torch import Tensor

from mlo._audit._krylov import extremes, least_residual
from mlo._audit._memory import peak_of

CPU = torch.device("cpu")


def symmetric(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues, in a random basis."""
    basis, _ = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


SPECTRA = {
    "definite": [0.01 * 1.1**k for k in range(60)],
    "indefinite": [*torch.linspace(-0.3, 2.0, 80).tolist()],
    "negative": [-3.0, -2.0, -1.0],
    "cluster at zero": [0.0] * 50 + [1.0, 2.0, 7.0],
    "multiple": [2.0] * 20,
    "one number": [5.0],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_ends_of_a_spectrum_are_those_of_eigvalsh(name):
    matrix = symmetric(SPECTRA[name])
    right = torch.linalg.eigvalsh(matrix)
    found = extremes(lambda v: matrix @ v, normal(len(matrix), seed=1), tolerance=1e-6, limit=200)
    size = right.abs().max().item()
    assert found.converged
    assert found.products <= len(matrix)
    assert found.lowest == pytest.approx(right[0].item(), abs=1e-6 * size)
    assert found.highest == pytest.approx(right[-1].item(), abs=1e-6 * size)


@pytest.mark.parametrize("seed", range(20))
def test_an_eigenvalue_lies_within_the_stated_error_however_early_it_stops(seed):
    matrix = symmetric((normal(40, seed=seed) * 3).tolist(), seed=seed + 100)
    right = torch.linalg.eigvalsh(matrix)
    found = extremes(lambda v: matrix @ v, normal(40, seed=seed + 200), tolerance=1e-12, limit=8)
    assert not found.converged
    assert found.products == 8
    assert (right - found.lowest).abs().min().item() <= found.lowest_error * (1 + 1e-9)
    assert (right - found.highest).abs().min().item() <= found.highest_error * (1 + 1e-9)
    assert found.lowest_error > 1e-12 * right.abs().max()


def test_a_zero_matrix_and_one_that_is_not_finite():
    zero = extremes(torch.zeros_like, normal(7, seed=0), tolerance=1e-6, limit=50)
    assert (zero.lowest, zero.highest, zero.converged) == (0.0, 0.0, True)
    wrong = extremes(lambda v: v * math.nan, normal(7, seed=0), tolerance=1e-6, limit=50)
    assert math.isnan(wrong.highest)
    assert not wrong.converged


@pytest.mark.parametrize("name", ["definite", "indefinite", "negative", "one number"])
def test_minimal_residuals_solve_definite_and_indefinite_systems(name):
    matrix = symmetric(SPECTRA[name])
    right = normal(len(matrix), seed=2)
    found = least_residual(lambda v: matrix @ v, right, tolerance=1e-10, limit=500)
    assert found.residual <= 1e-10
    torch.testing.assert_close(found.vector, torch.linalg.solve(matrix, right), rtol=1e-6, atol=0)


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_a_truncated_solution_has_the_least_residual_of_its_krylov_space(limit):
    matrix = symmetric(SPECTRA["indefinite"])
    right = normal(len(matrix), seed=3)
    space = torch.stack([torch.linalg.matrix_power(matrix, k) @ right for k in range(limit)], dim=1)
    space, _ = torch.linalg.qr(space)
    best = torch.linalg.lstsq(matrix @ space, right[:, None]).solution
    least = ((matrix @ space @ best)[:, 0] - right).norm() / right.norm()
    found = least_residual(lambda v: matrix @ v, right, tolerance=1e-12, limit=limit)
    assert found.products == limit
    assert found.residual == pytest.approx(least.item(), rel=1e-8)
    assert ((right - matrix @ found.vector).norm() / right.norm()).item() == pytest.approx(least.item(), rel=1e-8)


def test_what_has_no_solution_keeps_its_residual():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    right = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    found = least_residual(lambda v: matrix @ v, right, tolerance=1e-10, limit=50)
    assert found.residual == pytest.approx(2 / 3)


def test_memory_is_counted_while_it_is_alive():
    given = torch.zeros(1000, dtype=torch.float64)

    def work() -> float:
        first = given + 1  # 8,000 bytes
        view = first.view(10, 100)  # none
        second = view * 2  # 8,000 bytes
        del first, view
        third = second.sum(0)  # 800 bytes, of what is alive beside 8,000
        return third.sum().item()

    assert peak_of(work, CPU) == (2000.0, 16_000)


def test_saved_activations_are_counted_and_freed():
    weight = torch.ones(100, dtype=torch.float64, requires_grad=True)

    def deep(layers: int) -> float:
        value = weight
        for _ in range(layers):
            value = value.sin()
        (gradient,) = torch.autograd.grad(value.sum(), weight)
        return gradient.sum().item()

    peaks = [peak_of(lambda layers=layers: deep(layers), CPU)[1] for layers in (10, 20, 20)]
    assert peaks[1] == peaks[2]
    assert peaks[1] - peaks[0] == 10 * 800

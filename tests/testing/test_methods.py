"""Every shipped method has every property it claims: a new method is one more row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mlo
from mlo.hypergradient import (
    GMRES,
    CentralDifference,
    ConjugateGradient,
    Equilibrium,
    Exact,
    FiniteDifference,
    FirstOrder,
    Forward,
    Implicit,
    Neumann,
    Nystrom,
    Preconditioned,
    Unroll,
    ZerothOrder,
)
from mlo.testing import PROPERTIES, check_method, problems


def krylov(size: int) -> Any:
    """q that minimises ‖q − H⁻¹λ‖_H over span(λ, Hλ, …, H^{size−1}λ): what conjugate gradients promise."""

    def answer(h: Tensor, cotangent: Tensor) -> Tensor:
        basis, vector = [], cotangent
        for _ in range(min(size, len(cotangent))):
            for _ in range(2):
                for other in basis:
                    vector = vector - (other @ vector) * other
            if vector.norm() <= 1e-9 * cotangent.norm():
                break
            basis.append(vector / vector.norm())
            vector = h @ basis[-1]
        if not basis:
            return torch.zeros_like(cotangent)
        q = torch.stack(basis, dim=1)
        return q @ torch.linalg.solve(q.T @ h @ q, q.T @ cotangent)

    return answer


def minimal_residual(size: int) -> Any:
    """q that minimises ‖λ − Hq‖ over span(λ, Hλ, …, H^{size−1}λ): what GMRES promises."""

    def answer(h: Tensor, cotangent: Tensor) -> Tensor:
        vectors = [cotangent]
        for _ in range(min(size, len(cotangent)) - 1):
            vectors.append(h @ vectors[-1] / (h @ vectors[-1]).norm().clamp(min=1e-300))
        basis = torch.stack(vectors, dim=1)
        return basis @ (torch.linalg.pinv(h @ basis) @ cotangent)

    return answer


def series(terms: int, step_size: float) -> Any:
    """q = α Σ (I − αH)ᵏ λ: what a truncated Neumann series promises."""

    def answer(h: Tensor, cotangent: Tensor) -> Tensor:
        factor = torch.eye(len(h), dtype=h.dtype) - step_size * h
        return step_size * sum(torch.linalg.matrix_power(factor, k) @ cotangent for k in range(terms + 1))

    return answer


def damped(damping: float) -> Any:
    """q = (H + δI)⁻¹λ."""
    return lambda h, cotangent: torch.linalg.solve(h + damping * torch.eye(len(h), dtype=h.dtype), cotangent)


RATE = 0.5
"""The learning rate of the lower optimizer, where a property does not choose another: of plain SGD."""

CG = {"exact cost"}  # they stop at a tolerance
METHODS = [  # method, the answer its theory promises, relative tolerance, what it does not claim
    (Unroll(), "unrolled", 1e-10, ()),
    (Unroll(replay=True), "unrolled", 1e-10, ()),
    (Unroll(checkpoint="sqrt"), "unrolled", 1e-10, ()),
    (Unroll(last=1), "last_step", 1e-10, ()),
    (Unroll(last=2, replay=True), 2, 1e-10, ()),
    (FiniteDifference(radius=1e-2), "last_step", 1e-3, ()),
    (Exact(), "exact", 1e-9, {"unused"}),  # a tensor that is not read makes the Hessian singular
    (Exact(damping=0.3), damped(0.3), 1e-9, ()),
    (ConjugateGradient(iterations=12), "exact", 1e-8, CG),
    (ConjugateGradient(iterations=12, damping=0.3), damped(0.3), 1e-8, CG),
    (ConjugateGradient(iterations=2), krylov(2), 1e-6, {*CG, "linearity"}),  # the space depends on the cotangent
    (Neumann(terms=5, step_size=0.7), series(5, 0.7), 1e-10, ()),
    (Neumann(terms=300, step_size=0.8, tolerance=1e-10), "exact", 1e-8, {"exact cost"}),
    (Neumann(terms=300, step_size="auto", tolerance=1e-10), "exact", 1e-8, {"exact cost"}),
    (ConjugateGradient(iterations=12, warm_start=True), "exact", 1e-8, CG),
    (Nystrom(rank=6, damping=0.3), damped(0.3), 1e-9, ()),  # no level has more numbers, but for those that are not read
    (Nystrom(rank=6, damping=1e-3), damped(1e-3), 1e-8, ()),
    (Forward(), "unrolled", 1e-10, ()),
    (ZerothOrder(radius=1e-2), "unrolled", 1e-3, {"replayed = direct"}),  # a step of Adam may turn within the radius
    (GMRES(iterations=12), "exact", 1e-8, CG),
    (GMRES(iterations=12, damping=0.3), damped(0.3), 1e-8, CG),
    (GMRES(iterations=2, tolerance=0.0), minimal_residual(2), 1e-6, {*CG, "linearity"}),
    (Equilibrium(), "exact", 1e-8, CG),  # of a player by itself
    (FirstOrder(), "first_order", 1e-10, ()),
    (FirstOrder(scale=0.3), lambda h, cotangent: 0.3 * cotangent, 1e-10, ()),
    (
        Preconditioned(scale=3.0),
        lambda h, cotangent: 3.0 * RATE * cotangent,
        1e-10,
        {"closed form", "nested"},
    ),  # it needs a step
    (Implicit(inverse=Nystrom(rank=6, damping=0.3), cross=CentralDifference(radius=1e-2)), damped(0.3), 1e-3, ()),
    (Implicit(inverse=Exact(damping=0.3), cross=CentralDifference(radius=1e-2)), damped(0.3), 1e-3, ()),
]
rows = pytest.mark.parametrize(
    ("method", "answer", "tolerance", "without"), METHODS, ids=[repr(row[0]).replace("mlo.", "") for row in METHODS]
)


@rows
def test_a_shipped_method_has_the_properties_it_claims(method, answer, tolerance, without):
    check_method(method, answer=answer, tolerance=tolerance, without=without, examples=25)


def test_a_converged_neumann_series_is_an_exact_inverse():
    check_method(
        Neumann(terms=50, step_size=1.0), answer="exact", tolerance=1e-7, problems=problems(condition=3), examples=5
    )


def test_a_converged_series_that_chooses_its_step_size_is_an_exact_inverse():
    method = Neumann(terms=80, step_size="auto")
    check_method(
        method, answer="exact", tolerance=1e-7, without={"exact cost"}, problems=problems(condition=3), examples=5
    )


@pytest.mark.slow
@rows
def test_in_depth(method, answer, tolerance, without):
    check_method(method, answer=answer, tolerance=tolerance, without=without, examples=200)


def test_every_shipped_method_is_in_the_table():
    shipped = {
        found
        for found in vars(mlo.hypergradient).values()
        if isinstance(found, type)
        and issubclass(found, mlo.hypergradient.AbstractHypergradient)
        and not found.__name__.startswith("Abstract")
    }
    assert {type(row[0]) for row in METHODS} == shipped


@pytest.mark.parametrize("row", [row for row in METHODS if row[1] == "exact"], ids=lambda row: repr(row[0]))
def test_a_converged_method_is_right_to_four_digits_in_float32(row):
    method, answer, _, without = row
    asked = {"closed form", "response", "float32"} - set(without)
    check_method(
        method,
        answer=answer,
        float32_tolerance=1e-4,
        problems=problems(dtypes=[torch.float32]),
        without=PROPERTIES.keys() - asked,
    )

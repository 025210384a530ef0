"""Lanczos' method on a symmetric operator, with every vector kept orthogonal to all before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, final

import torch

if TYPE_CHECKING:
    from torch import Tensor

Operator: TypeAlias = "Callable[[Tensor], Tensor]"
"""v ↦ Hv on flat vectors."""

NUMBERS = 25_000_000
"""How many numbers the kept vectors may hold together: 200 MB in float64."""

_LOOK = 5
"""Products between two looks at what has been found, each of which costs O(k³)."""


@final
@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum.

    - `lowest`, `highest`: the extreme Ritz values; each is within its `error` of an eigenvalue.
    - `products`: Hessian products it took.
    - `converged`: whether both errors are below the tolerance, relative to the Ritz value of largest size.
    """

    lowest: float
    highest: float
    lowest_error: float
    highest_error: float
    products: int
    converged: bool


@final
@dataclass(frozen=True)
class Solution:
    """q with the least ‖λ − Hq‖ in the Krylov space of λ, the relative size of that, and the products it took."""

    vector: Tensor
    residual: float
    products: int


def extremes(operator: Operator, start: Tensor, *, tolerance: float, limit: int) -> Extremes:
    """λ_min and λ_max of a symmetric `operator` (Golub and Van Loan 2013, §10.1).

    A Ritz pair (θ, Vs) after k products has ‖HVs − θVs‖ = β_k |s_k|, so some eigenvalue lies that close to θ. It stops
    when both ends have β_k |s_k| ≤ `tolerance` · max |θ|, or after `limit` products. An eigenvector that `start` is
    orthogonal to is not found: start with random numbers. Numbers that are not finite give NaN.
    """
    most = _affordable(limit, len(start))
    basis = _Basis(start, most)
    while True:
        basis.grow(operator)
        if not basis.is_finite:
            return Extremes(math.nan, math.nan, math.nan, math.nan, basis.products, converged=False)
        last = basis.spent or basis.products == most
        if not last and basis.products % _LOOK:
            continue
        values, vectors = torch.linalg.eigh(basis.square())
        low, *_, high = (basis.beside * vectors[-1].abs()).tolist() * (2 if len(values) == 1 else 1)
        done = max(low, high) <= tolerance * values.abs().max().item()
        if done or last:
            return Extremes(values[0].item(), values[-1].item(), low, high, basis.products, converged=done)


def least_residual(operator: Operator, right: Tensor, *, tolerance: float, limit: int) -> Solution:
    """Solve Hq = λ for a symmetric, possibly indefinite `operator` (Paige and Saunders 1975, MINRES) from q = 0.

    q = V_k y with y = argmin ‖β₁e₁ − T̄_k y‖. Stops at a relative residual of `tolerance`, when a product adds nothing to
    the space, or after `limit` products.
    """
    length = right.norm().item()
    most = _affordable(limit, len(right))
    basis = _Basis(right, most)
    while True:
        basis.grow(operator)
        if not basis.is_finite:
            return Solution(torch.full_like(right, math.nan), math.nan, basis.products)
        last = basis.spent or basis.products == most
        if not last and basis.products % _LOOK:
            continue
        tall = basis.tall()
        goal = torch.zeros(len(tall), dtype=torch.float64)
        goal[0] = length
        y = torch.linalg.lstsq(tall, goal[:, None], driver="gelsd").solution[:, 0]
        residual = ((goal - tall @ y).norm() / length).item()
        if residual <= tolerance or last:
            return Solution(basis.combined(y), residual, basis.products)


def _affordable(limit: int, size: int) -> int:
    return max(1, min(limit, size, NUMBERS // size))


@final
class _Basis:
    """V_k, orthonormal, and the tridiagonal T_k = VᵀHV, as they grow by one product each."""

    def __init__(self, start: Tensor, most: int) -> None:
        self._vectors = start.new_empty(most + 1, len(start))
        self._vectors[0] = start / start.norm()
        self._diagonal: list[float] = []
        self._beside: list[float] = []

    @property
    def products(self) -> int:
        """k."""
        return len(self._diagonal)

    @property
    def beside(self) -> float:
        """β_k, the length of what the last product adds to the space."""
        return self._beside[-1]

    @property
    def spent(self) -> bool:
        """Whether the last product adds nothing."""
        return self.beside == 0

    @property
    def is_finite(self) -> bool:
        """Whether the last product is."""
        return math.isfinite(self._diagonal[-1]) and math.isfinite(self.beside)

    def grow(self, operator: Operator) -> None:
        """One more product."""
        known = self._vectors[: self.products + 1]
        image = operator(known[-1])
        scale = image.norm().item()
        self._diagonal.append(torch.dot(image, known[-1]).item())
        for _ in range(2):  # once leaves a part as large as rounding times the cancellation; twice is enough (Kahan)
            image = image - (known @ image) @ known
        length = image.norm().item()
        spent = length <= 1e-14 * scale or len(known) == len(image)
        self._beside.append(0.0 if spent else length)
        if not spent:
            self._vectors[len(known)] = image / length

    def square(self) -> Tensor:
        """T_k, k × k."""
        diagonal, beside = (torch.tensor(each, dtype=torch.float64) for each in (self._diagonal, self._beside[:-1]))
        return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)

    def tall(self) -> Tensor:
        """T̄_k, (k + 1) × k, with β_k below."""
        below = torch.zeros(1, self.products, dtype=torch.float64)
        below[0, -1] = self.beside
        return torch.cat([self.square(), below])

    def combined(self, weights: Tensor) -> Tensor:
        """V_k · weights."""
        return weights.to(self._vectors) @ self._vectors[: len(weights)]

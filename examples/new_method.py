"""Invent a hypergradient method and prove it: heavy-ball iterations for q = H⁻¹λ, which feel √κ where Neumann feels κ."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, final

from mlo.hypergradient import AbstractInverse, AbstractLinearisation
from mlo.testing import check_method


def combine(*terms: tuple[float, Any]) -> Any:
    if isinstance(terms[0][1], Mapping):  # tensors by name; otherwise one tensor
        return {name: sum(factor * tree[name] for factor, tree in terms) for name in terms[0][1]}
    return sum(factor * tree for factor, tree in terms)


@final
@dataclass(frozen=True, kw_only=True)
class HeavyBall(AbstractInverse):
    """qₖ₊₁ = qₖ + α(λ − Hqₖ) + β(qₖ − qₖ₋₁) from 0 (Polyak 1964): a product takes √β = (√L − √μ)/(√L + √μ) of the error."""

    iterations: int
    least: float  # μ, below the smallest eigenvalue of H
    most: float  # L, above the largest

    def products(self, size: int) -> int:
        return self.iterations

    def solve(self, at: AbstractLinearisation, cotangent: Any) -> Any:
        alpha = 4 / (sqrt(self.most) + sqrt(self.least)) ** 2
        beta = ((sqrt(self.most) - sqrt(self.least)) / (sqrt(self.most) + sqrt(self.least))) ** 2
        before = q = combine((0.0, cotangent))
        for _ in range(self.iterations):
            before, q = q, combine((1 + beta, q), (-beta, before), (alpha, cotangent), (-alpha, at.hessian(q)))
        return q


check_method(HeavyBall(iterations=40, least=0.1, most=1.2), answer="exact", tolerance=1e-7, examples=10)
print("a heavy ball is an exact inverse, with every property of mlo.testing")

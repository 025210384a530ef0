"""Invert the Hessian by a geometric series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractLinearisation
from mlo.hypergradient._implicit import AbstractInverse

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class Neumann(AbstractInverse):
    r"""A truncated Neumann series (Lorraine et al. 2020, Alg. 3; MADAO, Eqs. 5–7).

    For the Hessian H of a level's objective and a cotangent λ on its response,

        q = α Σ_{k=0..K} (I − αH)ᵏ λ  →  H⁻¹λ.

    Needs H ≻ 0 and 0 < α < 2/λ_max; an indefinite Hessian diverges along its negative curvature. If H ⪰ μI and
    α ≤ 1/λ_max: ‖q − H⁻¹λ‖ ≤ (1 − αμ)^{K+1} ‖H⁻¹λ‖. Where α(K+1)λ_max ≪ 1 it is first order. Costs K Hessian products;
    memory does not grow with K. Reports `residual`, ‖λ − Hq'‖/‖λ‖ of the series q' without its last term.

    - `terms`: K, the number of terms after the identity, so K + 1 in all. K = 0 is `FirstOrder(scale=step_size)`.
    - `step_size`: α, in units of 1/curvature.
    - `damping`: δ ≥ 0, inverts H + δI.
    """

    terms: int
    step_size: float
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise ValueError(f"terms must be at least 0, got {self.terms}")
        if not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be at least 0, got {self.damping}")

    def products(self, size: int) -> int:
        """K."""
        return self.terms

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class."""
        term = series = cotangent
        for _ in range(self.terms):
            image = at.hessian(term)
            if self.damping:
                image = _tree.add(image, term, scale=self.damping)
            term = _tree.add(term, image, scale=-self.step_size)
            series = _tree.add(series, term)
        length = _tree.norm(cotangent)
        at.report("residual", _tree.norm(term) / (length + (length == 0)))
        return _tree.scale(series, by=self.step_size)

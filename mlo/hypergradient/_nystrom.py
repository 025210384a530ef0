"""Invert a low-rank approximation of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from mlo.hypergradient._abstract import AbstractLinearisation
from mlo.hypergradient._implicit import AbstractInverse
from mlo.hypergradient._iterative import check_chunks

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class Nystrom(AbstractInverse):
    r"""q = (H̃ + δI)⁻¹ λ with a Nyström approximation H̃ of the Hessian (Hataya and Yamada 2023).

    With r random directions Ω,

        H̃ = HΩ (ΩᵀHΩ)⁺ ΩᵀH        and (H̃ + δI)⁻¹ λ by the Woodbury identity

    Hataya and Yamada take r columns of H; here Ω is an orthonormal basis of r Gaussian directions, keyed by the seed, the
    iteration and the level. Linear in λ and symmetric, with no step size and no iterations. For H ⪰ 0, with E = H − H̃ ⪰ 0,

        0 ⪯ (H̃ + δI)⁻¹ − (H + δI)⁻¹ ⪯ ‖E‖/(δ(δ + ‖E‖)) I

    so that it equals `Exact(damping=δ)` where r reaches the rank of H, and is good where the eigenvalues that r directions
    leave out are below δ: what H̃ misses is divided by δ alone. An indefinite H is approximated as well, with no such bound,
    and reported as `negative_curvature` 1. Also reports `lambda_max`, the largest eigenvalue of H̃ (for H ⪰ 0 at most λ_max).
    Costs min(r, n) Hessian products for n variables, O(n r²) time, and memory for about 5.5 copies of them a
    direction.

    - `rank`: r, how many random directions.
    - `damping`: δ > 0, in units of curvature.
    - `chunks`: in how many parts of the batch products are taken; see `Implicit`.
    - `compare`: `first_order` reports the cosine with what `first_order` pulls back, for one more cross product.
    """

    rank: int
    damping: float
    chunks: int = 1
    compare: Literal["first_order"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping}")
        check_chunks(self.chunks)

    def products(self, size: int) -> int:
        """One a direction, and no more directions than variables."""
        return min(self.rank, size)

    @property
    def needs_symmetry(self) -> bool:
        """Yes."""
        return True

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class."""
        return at.nystrom_solve(cotangent, rank=self.rank, damping=self.damping)

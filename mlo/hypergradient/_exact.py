"""Invert the Hessian by a dense solve."""

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
class Exact(AbstractInverse):
    """q = (H + damping · I)⁻¹ λ with the whole matrix, for levels of up to a few thousand numbers.

    Costs n Hessian products, O(n²) memory and O(n³) time for n variables; the reference other methods are held against.
    A singular matrix gives a hypergradient that is not finite, which stops the run. Any non-singular H will do,
    indefinite ones too.

    - `damping`: δ ≥ 0, in units of curvature.
    - `chunks`: in how many parts of the batch products are taken; see `Implicit`.
    - `compare`: `first_order` reports the cosine with what `first_order` pulls back, for one more cross product.
    """

    damping: float = 0.0
    chunks: int = 1
    compare: Literal["first_order"] | None = None

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"damping must be at least 0, got {self.damping}")
        check_chunks(self.chunks)

    def products(self, size: int) -> int:
        """n."""
        return size

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class."""
        return at.dense_solve(cotangent, damping=self.damping)

"""Take the inverse Hessian for a multiple of the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractLinearisation
from mlo.hypergradient._implicit import AbstractInverse
from mlo.hypergradient._iterative import check_chunks

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class FirstOrder(AbstractInverse):
    """q = scale · λ, with the cross product at the response (MADAO, Table 5, "first order"; Luketina et al. 2016).

    No Hessian product. The direction is right where H is a multiple of the identity; the size is right where
    scale = 1/H. To drop the indirect part altogether, leave the level out of `subject_to`.

    - `scale`: in units of 1/curvature.
    - `chunks`: in how many parts of the batch products are taken; see `Implicit`.
    """

    scale: float = 1.0
    chunks: int = 1

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        check_chunks(self.chunks)

    def products(self, size: int) -> int:
        """None."""
        return 0

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class."""
        return _tree.scale(cotangent, by=self.scale)

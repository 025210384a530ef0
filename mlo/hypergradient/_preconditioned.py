"""Take the inverse Hessian for the optimizer's own preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractLinearisation
from mlo.hypergradient._implicit import AbstractInverse
from mlo.hypergradient._iterative import check_chunks

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class Preconditioned(AbstractInverse):
    r"""q = −scale · (∂w'/∂g)ᵀ λ with the last step w' = update(g, …) of the optimizer (SAMA, Choe et al. 2023).

    The inverse Hessian is taken for what the optimizer multiplies a gradient by, P = −∂w'/∂g, moments and all: η for SGD,
    (1 + μ)η for Nesterov's momentum μ, and for Adam a diagonal that is large where gradients have been small. P contains the
    learning rate, so that `scale` has no units: scale = 1 is one step of the optimizer, and then the pullback is that of
    `Unroll(last=1)` with the cross product taken where the step ended and not where it began. An optimizer with momentum μ
    (Adam: β₁) gives one gradient only the first of its steps 1, μ, μ², …; scale = 1/(1 − μ) counts them all. The direction
    is right where P is a multiple of H⁻¹. Costs no Hessian product.

    It needs a step: with `steps=0` it contributes nothing, as `Unroll` and `FiniteDifference` do, and a graph that is run
    must have some.

    - `scale`: a factor; 1 is one step of the optimizer.
    - `chunks`: in how many parts of the batch products are taken; see `Implicit`.
    - `compare`: `first_order` reports the cosine with what `first_order` pulls back, for one more cross product.
    """

    needs_step = True

    scale: float = 1.0
    chunks: int = 1
    compare: Literal["first_order"] | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        check_chunks(self.chunks)

    def products(self, size: int) -> int:
        """None."""
        return 0

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class."""
        return _tree.scale(at.pull_update(cotangent), by=-self.scale)

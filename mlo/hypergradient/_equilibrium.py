"""Differentiate the players of a game together, at their equilibrium."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from mlo.hypergradient._abstract import AbstractCross, AbstractHypergradient, AbstractResponse, Cost, Nesting, Tape
from mlo.hypergradient._cross import ExactCross
from mlo.hypergradient._gmres import GMRES
from mlo.hypergradient._implicit import AbstractInverse, Implicit

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream
    from mlo.optimizer import AbstractOptimizer


def _gmres() -> GMRES:
    return GMRES(iterations=50)


@final
@dataclass(frozen=True, kw_only=True)
class Equilibrium(AbstractHypergradient):
    r"""Pull back through ∂fᵢ/∂wᵢ(w₁, …, w_n, u) = 0 of all players i of a simultaneous game together.

    With the joint gradient g(w, u) = (∂f₁/∂w₁, …, ∂f_n/∂w_n), whose Jacobian J = ∂g/∂w is not symmetric,

        ū = −(∂g/∂u)ᵀ q,    Jᵀ q ≈ λ,    λ = (λ₁, …, λ_n)

    (the implicit function theorem at a stationary point of the game, as `Implicit` for one level). Every player is
    linearised where all responses ended. All players carry this method, with the same settings, and the upper level lists
    them all in `subject_to`; they list each other in `against`. Exact at an equilibrium with an exact inverse. Of a player
    by itself, J is its Hessian. Costs one gradient and one product a player for each product with J.

    - `inverse`: `GMRES` or `Exact`; `Neumann` where I − αJ contracts.
    - `cross`: `ExactCross` or `CentralDifference`.

    Raises ValueError for an inverse that needs a symmetric matrix, a step, or chunks.
    """

    inverse: AbstractInverse = field(default_factory=_gmres)
    cross: AbstractCross = field(default_factory=ExactCross)

    def __post_init__(self) -> None:
        if self.inverse.needs_step:
            raise ValueError("the steps of several players are not one step: take GMRES")
        if self.inverse.chunks > 1:
            raise ValueError("the products of several players are not divided into chunks: leave out chunks")
        if self.inverse.needs_symmetry:
            kind = type(self.inverse).__name__
            raise ValueError(f"{kind} needs a symmetric matrix, and the Jacobian of a game has none: take GMRES")

    @property
    def is_joint(self) -> bool:
        """Yes."""
        return True

    @property
    def may_stop(self) -> bool:
        """See `AbstractHypergradient`."""
        return self.inverse.may_stop

    def tape(self, steps: int, size: int) -> Tape:
        """See `Implicit`."""
        return self._single.tape(steps, size)

    def cost(self, steps: int, size: int) -> Cost:
        """Of one player's share: a solve of n numbers in all takes as many products of each."""
        return self._single.cost(steps, size)

    def nesting(self, steps: int, size: int) -> Nesting:
        """It cannot stand below a nested level."""
        return Nesting(refused="an equilibrium is differentiated once, not again")

    def objection(self, optimizer: AbstractOptimizer) -> str | None:
        """See `Implicit`."""
        return self._single.objection(optimizer)

    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """See the class; `response` and `cotangent` are those of all players together."""
        return self._single.pullback(response, cotangent)

    @property
    def _single(self) -> Implicit:
        return Implicit(inverse=self.inverse, cross=self.cross)

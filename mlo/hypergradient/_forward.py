"""Differentiate through the optimizer's own steps while they are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo.hypergradient._abstract import AbstractHypergradient, AbstractResponse, Cost, Nesting, Tape

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream
    from mlo.optimizer import AbstractOptimizer


@final
@dataclass(frozen=True, kw_only=True)
class Forward(AbstractHypergradient):
    r"""Forward-mode differentiation of the k optimizer steps of the iteration, momentum and all.

    Beside the variables and moments (w, s), one tangent of them is carried along for every number of every level u that
    is read, from (0, 0) at the start:

        (ẇ, ṡ) ← ∂step/∂(w, s) (ẇ, ṡ) + ∂step/∂u        ū_j = ⟨λ, ẇ_j⟩

    (Franceschi et al. 2017, Alg. 2, "forward-HG"). Equals `Unroll` up to rounding. Memory does not grow with the number of
    steps: one copy of (w, s) for each of the m numbers read. For few hyper-parameters and steps without number; with more
    numbers than steps, `Unroll` is cheaper. The objective's second derivatives are taken symmetric, as they are where it
    is twice differentiable; no forward-mode derivative of an operator is used. Costs one gradient and m products a step,
    while the steps are taken; the pullback itself costs nothing.
    """

    @property
    def follows_optimizer(self) -> bool:
        """Yes."""
        return True

    def tape(self, steps: int, size: int) -> Tape:
        """The tangents."""
        return Tape(recorded=0, kept=1, forward=True)

    def cost(self, steps: int, size: int) -> Cost:
        """Nothing: the tangents are paid for where the steps are."""
        return Cost(gradients=0, products=0)

    def cost_of_reads(self, steps: int, numbers: int) -> Cost:
        """One gradient a step, and one product for each number."""
        return Cost(gradients=steps, products=steps * numbers)

    def nesting(self, steps: int, size: int) -> Nesting:
        """Tangents have no history, and follow the derivatives of one objective."""
        return Nesting(
            refused="tangents that are carried along cannot be differentiated again",
            needs_objective="its tangents follow the second derivatives of one objective, not of a total gradient",
        )

    def objection(self, optimizer: AbstractOptimizer) -> str | None:
        """None: every optimizer is differentiable."""
        return None

    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """See the class. With no steps the response depends on nothing."""
        return response.contract(cotangent) if response.steps else {}

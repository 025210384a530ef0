"""Differentiate through the optimizer's own steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo.hypergradient._abstract import AbstractHypergradient, AbstractResponse, Cost

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream


@final
@dataclass(frozen=True, kw_only=True)
class Unroll(AbstractHypergradient):
    r"""Reverse-mode differentiation of the k optimizer steps of the iteration, momentum and all.

    With w_{i+1}, s_{i+1} = step(w_i, s_i, u) and the start (w_0, s_0) held fixed, a cotangent λ on w_k becomes

        ū = (dw_k/du)ᵀ λ        (Franceschi et al. 2017, Alg. 1, "reverse-HG")

    Exact for the response as it was computed, up to rounding. Costs one second-order reverse pass a step. The steps are
    recorded while they are taken, so memory grows by one activation set a step.
    """

    def recorded(self, steps: int) -> int:
        """All of them."""
        return steps

    def cost(self, steps: int) -> Cost:
        """One product a step."""
        return Cost(gradients=0, products=steps)

    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """See the class. With no steps the response depends on nothing."""
        return response.pull_recorded(cotangent) if response.steps else {}

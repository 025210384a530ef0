"""Adam: adaptive moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.optimizer._abstract import AbstractOptimizer, OptimizerState, at_least_zero, fraction, positive

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class Adam(AbstractOptimizer):
    r"""Adam (Kingma and Ba 2015, Alg. 1), equal to `torch.optim.Adam` step for step.

        g = ∇f + weight_decay · w
        m ← m + (1 − β₁)(g − m),    v ← β₂ v + (1 − β₂) g²
        w ← w − learning_rate/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)

    The derivative of √v at v = 0 is taken as 0 (there v, and with it the derivative of v in g, is zero): unrolling
    through an entry whose gradient was always exactly zero gives zero and not NaN. The L2 weight decay is part of what
    is minimised.

    - `learning_rate`: in units of the parameters; a step is about that long.
    - `beta1`, `beta2`: the decay of the first and second moment.
    - `epsilon`: ε, in units of the gradient.
    - `weight_decay`: in units of curvature.

    Raises ValueError for settings outside these ranges.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        fraction("beta1", self.beta1)
        fraction("beta2", self.beta2)
        at_least_zero("epsilon", self.epsilon)
        at_least_zero("weight_decay", self.weight_decay)

    def init(self, parameters: Tree) -> OptimizerState:
        """Zero first and second moments."""
        return OptimizerState(moments={"first": _tree.zeros(parameters), "second": _tree.zeros(parameters)})

    def update(self, gradient: Tree, state: OptimizerState, parameters: Tree) -> tuple[Tree, OptimizerState]:
        """One step, see the class."""
        count = state.count + 1
        if self.weight_decay:
            gradient = _tree.add(gradient, parameters, scale=self.weight_decay)
        first = _tree.apply(lambda m, g: m.lerp(g, 1 - self.beta1), state.moments["first"], gradient)
        second = _tree.apply(
            lambda v, g: (v * self.beta2).addcmul(g, g, value=1 - self.beta2), state.moments["second"], gradient
        )
        size = self.learning_rate / (1 - self.beta1**count)
        spread = (1 - self.beta2**count) ** 0.5

        def move(parameter: Tensor, m: Tensor, v: Tensor) -> Tensor:
            return parameter.addcdiv(m, _root(v) / spread + self.epsilon, value=-size)

        updated = _tree.apply(move, parameters, first, second)
        return updated, OptimizerState(count=count, moments={"first": first, "second": second})


def _root(square: Tensor) -> Tensor:
    """√square, with derivative 0 where `square` is 0."""
    if not square.requires_grad:
        return square.sqrt()
    nothing = (square == 0).to(square.dtype)
    return (square + nothing).sqrt() - nothing  # √1 − 1 at zero, where the derivative of `square` is zero too

"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.optimizer._abstract import AbstractOptimizer, OptimizerState, at_least_zero, fraction, positive

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class SGD(AbstractOptimizer):
    r"""Gradient descent with momentum, Nesterov's look-ahead, dampening and L2 weight decay.

        d = ∇f + decay · w
        b ← momentum · b + (1 − dampening) · d        (the first b is d itself, undampened)
        w ← w − learning_rate · b                     (Nesterov: d + momentum · b in place of b)

    Equals `torch.optim.SGD` step for step (Sutskever et al. 2013, with torch's form of Nesterov's method). The weight
    decay is part of what is minimised, f + decay/2 ‖w‖².

    - `learning_rate`: in units of 1/curvature.
    - `momentum`, `dampening`: without unit; `momentum` below 1.
    - `nesterov`: needs momentum and no dampening.
    - `weight_decay`: in units of curvature.

    Raises ValueError for settings outside these ranges.
    """

    learning_rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        fraction("momentum", self.momentum)
        at_least_zero("weight_decay", self.weight_decay)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum above 0 and dampening 0")

    def init(self, parameters: Tree) -> OptimizerState:
        """A zero momentum buffer, or nothing without momentum."""
        return OptimizerState(moments={"momentum": _tree.zeros(parameters)} if self.momentum else {})

    def update(self, gradient: Tree, state: OptimizerState, parameters: Tree) -> tuple[Tree, OptimizerState]:
        """One step, see the class."""
        direction = _tree.add(gradient, parameters, scale=self.weight_decay) if self.weight_decay else gradient
        moments = state.moments
        if self.momentum:
            weight = 1.0 if state.count == 0 else 1.0 - self.dampening
            decayed = _tree.scale(state.moments["momentum"], by=self.momentum)
            velocity = _tree.add(decayed, direction, scale=weight)
            direction = _tree.add(direction, velocity, scale=self.momentum) if self.nesterov else velocity
            moments = {"momentum": velocity}
        updated = _tree.add(parameters, direction, scale=-self.learning_rate)
        return updated, OptimizerState(count=state.count + 1, moments=moments)

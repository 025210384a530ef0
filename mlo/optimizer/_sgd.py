"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.optimizer._abstract import (
    AbstractOptimizer,
    Groups,
    OptimizerState,
    at_least_zero,
    check_shared,
    fraction,
    plain,
    positive,
)
from mlo.optimizer._arithmetic import is_zero
from mlo.optimizer._read import Option

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
    - `clip_norm`: the gradient is shortened to this Euclidean norm, over all variables of the level, before all else.
    - `clip_value`: its entries are cut to this size before that.
    - `groups`: other options for parameters by a pattern of their names, `{"*.bias": {"weight_decay": 0}}`.

    Raises ValueError for settings outside these ranges.
    """

    learning_rate: Option
    momentum: Option = 0.0
    dampening: Option = 0.0
    nesterov: bool = False
    weight_decay: Option = 0.0
    clip_norm: Option | None = None
    clip_value: Option | None = None
    groups: Groups | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        fraction("momentum", self.momentum)
        at_least_zero("weight_decay", self.weight_decay)
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise ValueError("nesterov needs momentum above 0 and dampening 0")
        check_shared(self)

    def init(self, parameters: Tree) -> OptimizerState:
        """A zero momentum buffer, or nothing without momentum."""
        return OptimizerState(moments={} if is_zero(self.momentum) else {"momentum": _tree.zeros(parameters)})

    def update(self, gradient: Tree, state: OptimizerState, parameters: Tree) -> tuple[Tree, OptimizerState]:
        """One step, see the class."""
        decay = plain(self.weight_decay)
        direction = gradient if is_zero(decay) else _tree.add(gradient, parameters, scale=decay)
        moments = state.moments
        if "momentum" in moments:
            momentum = plain(self.momentum)
            weight = 1.0 if state.count == 0 else 1.0 - plain(self.dampening)
            velocity = _tree.combined(moments["momentum"], direction, by=momentum, scale=weight)
            direction = _tree.add(direction, velocity, scale=momentum) if self.nesterov else velocity
            moments = {"momentum": velocity}
        updated = _tree.add(parameters, direction, scale=-plain(self.learning_rate))
        return updated, OptimizerState(count=state.count + 1, moments=moments)

    @property
    def l2_decay(self) -> Option:
        """See `AbstractOptimizer`."""
        return self.weight_decay

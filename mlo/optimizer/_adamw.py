"""Adam with decoupled weight decay."""

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
from mlo.optimizer._moments import adaptive_step, two_moments
from mlo.optimizer._read import Option

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class AdamW(AbstractOptimizer):
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, Alg. 2), equal to `torch.optim.AdamW`.

        m ← m + (1 − β₁)(∇f − m),    v ← β₂ v + (1 − β₂) (∇f)²
        w ← (1 − learning_rate · weight_decay) w − learning_rate/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)

    The decay belongs to no objective: where the steps come to rest, ∇f is not −decay · w but depends on m and v. Methods
    that differentiate an optimality condition therefore refuse it. Otherwise as `Adam`.

    - `learning_rate`: in units of the parameters; a step is about that long.
    - `beta1`, `beta2`: the decay of the first and second moment.
    - `epsilon`: ε, in units of the gradient.
    - `weight_decay`: of the parameters, in units of 1/learning_rate.
    - `clip_norm`: the gradient is shortened to this Euclidean norm, over all variables of the level, before all else.
    - `clip_value`: its entries are cut to this size before that.
    - `groups`: other options for parameters by a pattern of their names, `{"*.bias": {"weight_decay": 0}}`.

    Raises ValueError for settings outside these ranges.
    """

    learning_rate: Option = 1e-3
    beta1: Option = 0.9
    beta2: Option = 0.999
    epsilon: Option = 1e-8
    weight_decay: Option = 0.01
    clip_norm: Option | None = None
    clip_value: Option | None = None
    groups: Groups | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        fraction("beta1", self.beta1)
        fraction("beta2", self.beta2)
        at_least_zero("epsilon", self.epsilon)
        at_least_zero("weight_decay", self.weight_decay)
        check_shared(self)

    def init(self, parameters: Tree) -> OptimizerState:
        """Zero first and second moments."""
        return two_moments(parameters)

    def update(self, gradient: Tree, state: OptimizerState, parameters: Tree) -> tuple[Tree, OptimizerState]:
        """One step, see the class."""
        rate = plain(self.learning_rate)
        if not is_zero(self.weight_decay):
            parameters = _tree.scale(parameters, by=1 - rate * plain(self.weight_decay))
        return adaptive_step(
            gradient,
            state,
            parameters,
            rate=rate,
            betas=(plain(self.beta1), plain(self.beta2)),
            epsilon=plain(self.epsilon),
        )

    @property
    def l2_decay(self) -> Option | None:
        """None, or 0 where nothing decays."""
        return 0.0 if is_zero(self.weight_decay) else None

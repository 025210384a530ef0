"""RMSprop: steps divided by the size that gradients usually have."""

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
from mlo.optimizer._arithmetic import add_product, add_quotient, is_zero, mixed
from mlo.optimizer._read import Option
from mlo.optimizer._root import root

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class RMSprop(AbstractOptimizer):
    r"""RMSprop (Tieleman and Hinton 2012, lecture 6.5; centered: Graves 2013, Eq. 38), equal to `torch.optim.RMSprop`.

        g = ∇f + weight_decay · w
        v ← α v + (1 − α) g²,    ḡ ← ḡ + (1 − α)(g − ḡ)
        s = √v + ε                                    (centered: √(v − ḡ²) + ε)
        b ← momentum · b + g/s
        w ← w − learning_rate · b

    The derivative of the root at 0 is taken as 0, as in `Adam`. Where rounding makes v − ḡ² negative it counts as 0; torch
    goes on with NaN there. The L2 weight decay is part of what is minimised.

    - `learning_rate`: in units of the parameters; a step is about that long.
    - `alpha`: α, the decay of the averages.
    - `epsilon`: ε, in units of the gradient.
    - `momentum`: below 1.
    - `centered`: divide by the standard deviation of the gradient instead of its root mean square.
    - `weight_decay`: in units of curvature.
    - `clip_norm`: the gradient is shortened to this Euclidean norm, over all variables of the level, before all else.
    - `clip_value`: its entries are cut to this size before that.
    - `groups`: other options for parameters by a pattern of their names, `{"*.bias": {"weight_decay": 0}}`.

    Raises ValueError for settings outside these ranges.
    """

    learning_rate: Option = 1e-2
    alpha: Option = 0.99
    epsilon: Option = 1e-8
    momentum: Option = 0.0
    centered: bool = False
    weight_decay: Option = 0.0
    clip_norm: Option | None = None
    clip_value: Option | None = None
    groups: Groups | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        fraction("alpha", self.alpha)
        at_least_zero("epsilon", self.epsilon)
        fraction("momentum", self.momentum)
        at_least_zero("weight_decay", self.weight_decay)
        check_shared(self)

    def init(self, parameters: Tree) -> OptimizerState:
        """Zeros: the mean square, and with the options that need them the mean and the momentum buffer."""
        needed = {"square": True, "mean": self.centered, "momentum": not is_zero(self.momentum)}
        return OptimizerState(moments={name: _tree.zeros(parameters) for name, is_kept in needed.items() if is_kept})

    def update(self, gradient: Tree, state: OptimizerState, parameters: Tree) -> tuple[Tree, OptimizerState]:
        """One step, see the class."""
        alpha, epsilon, rate = plain(self.alpha), plain(self.epsilon), plain(self.learning_rate)
        if not is_zero(self.weight_decay):
            gradient = _tree.add(gradient, parameters, scale=plain(self.weight_decay))
        square = _tree.apply(
            lambda v, g: add_product(v * alpha, g, g, scale=1 - alpha), state.moments["square"], gradient
        )
        moments, spread = {"square": square}, square
        if "mean" in state.moments:
            mean = _tree.apply(lambda average, g: mixed(average, g, 1 - alpha), state.moments["mean"], gradient)
            spread = _tree.apply(lambda v, average: v.addcmul(average, average, value=-1).clamp(min=0), square, mean)
            moments["mean"] = mean
        size = _tree.apply(lambda v: root(v) + epsilon, spread)
        if "momentum" in state.moments:
            momentum = plain(self.momentum)
            moments["momentum"] = _tree.apply(
                lambda b, g, s: add_quotient(b * momentum, g, s, scale=1.0), state.moments["momentum"], gradient, size
            )
            updated = _tree.add(parameters, moments["momentum"], scale=-rate)
        else:
            updated = _tree.apply(lambda w, g, s: add_quotient(w, g, s, scale=-rate), parameters, gradient, size)
        return updated, OptimizerState(count=state.count + 1, moments=moments)

    @property
    def l2_decay(self) -> Option:
        """See `AbstractOptimizer`."""
        return self.weight_decay

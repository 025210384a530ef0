"""The pullback of an optimizer's update in closed form, where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlo import _tree
from mlo.optimizer._abstract import AbstractOptimizer, OptimizerState, plain
from mlo.optimizer._apply import at
from mlo.optimizer._arithmetic import is_one, is_zero
from mlo.optimizer._read import options_read
from mlo.optimizer._sgd import SGD

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream


def has_closed_pullback(optimizer: AbstractOptimizer) -> bool:
    """Whether `pulled_back` knows the formula: SGD that neither clips, nor groups parameters, nor reads options."""
    clips = optimizer.clip_norm is not None or optimizer.clip_value is not None
    return isinstance(optimizer, SGD) and not (clips or optimizer.groups or any(options_read(optimizer)))


def pulled_back(
    optimizer: AbstractOptimizer, iteration: int, state: OptimizerState, cotangent: Tree, moments: Upstream
) -> tuple[Tree, Upstream, Tree, Upstream] | None:
    """From cotangents on w' and s' of a step of `updated` to those on its gradient g, on s, and on w with g held fixed.

    For SGD, with λ on w' and m on the momentum buffer (zero where it is absent), and c = 1 − dampening (1 at first):

        b̄' = m − η λ,                 ḡ = c b̄'                   (Nesterov: b̄' = m − η·momentum·λ,  ḡ = c b̄' − η λ)
        b̄ = momentum · b̄',            w̄ = λ + decay · ḡ

    The same numbers as automatic differentiation, without evaluating the update. The last are those on levels that
    options are read from: none. None for other optimizers, see `has_closed_pullback`.
    """
    if not has_closed_pullback(optimizer):
        return None
    now = at(optimizer, iteration)
    assert isinstance(now, SGD)
    direction, velocity = _pulled(now, state, cotangent, moments)
    before: Upstream = {} if velocity is None else {"momentum": _tree.scale(velocity, by=plain(now.momentum))}
    decay = plain(now.weight_decay)
    return direction, before, _tree.add(cotangent, direction, scale=decay) if not is_zero(decay) else cotangent, {}


def pulled_back_to_gradient(
    optimizer: AbstractOptimizer, iteration: int, state: OptimizerState, cotangent: Tree
) -> Tree:
    """The first of what `pulled_back` gives, where it knows the formula: ḡ for λ on w' and nothing on the moments."""
    now = at(optimizer, iteration)
    assert isinstance(now, SGD)
    return _pulled(now, state, cotangent, {})[0]


def _pulled(now: SGD, state: OptimizerState, cotangent: Tree, moments: Upstream) -> tuple[Tree, Tree | None]:
    """ḡ and b̄' of `pulled_back`; without momentum there is no b̄'."""
    direction = _tree.scale(cotangent, by=-plain(now.learning_rate))
    if "momentum" not in state.moments:
        return direction, None
    velocity = _tree.scale(direction, by=plain(now.momentum)) if now.nesterov else direction
    velocity = _tree.add(moments["momentum"], velocity) if "momentum" in moments else velocity
    weight = 1.0 if state.count == 0 else 1.0 - plain(now.dampening)
    reached = velocity if is_one(weight) else _tree.scale(velocity, by=weight)
    return _tree.add(direction, reached) if now.nesterov else reached, velocity

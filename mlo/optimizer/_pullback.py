"""The pullback of an optimizer's update in closed form, where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlo import _tree
from mlo.optimizer._abstract import AbstractOptimizer, OptimizerState, plain
from mlo.optimizer._apply import at
from mlo.optimizer._read import options_read
from mlo.optimizer._sgd import SGD

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream


def pulled_back(
    optimizer: AbstractOptimizer, iteration: int, state: OptimizerState, cotangent: Tree, moments: Upstream
) -> tuple[Tree, Upstream, Tree, Upstream] | None:
    """From cotangents on w' and s' of a step of `updated` to those on its gradient g, on s, and on w with g held fixed.

    For SGD, with λ on w' and m on the momentum buffer (zero where it is absent), and c = 1 − dampening (1 at first):

        b̄' = m − η λ,                 ḡ = c b̄'                   (Nesterov: b̄' = m − η·momentum·λ,  ḡ = c b̄' − η λ)
        b̄ = momentum · b̄',            w̄ = λ + decay · ḡ

    The same numbers as automatic differentiation, without evaluating the update. The last are those on levels that
    options are read from: none. None for other optimizers, where the gradient is clipped, parameters are grouped or options
    are read.
    """
    clips = optimizer.clip_norm is not None or optimizer.clip_value is not None
    if clips or optimizer.groups or not isinstance(optimizer, SGD) or any(options_read(optimizer)):
        return None
    now = at(optimizer, iteration)
    momentum, decay = plain(now.momentum), plain(now.weight_decay)
    direction = _tree.scale(cotangent, by=-plain(now.learning_rate))
    before: Upstream = {}
    if "momentum" in state.moments:
        velocity = _tree.scale(direction, by=momentum) if now.nesterov else direction
        velocity = _tree.add(moments["momentum"], velocity) if "momentum" in moments else velocity
        before = {"momentum": _tree.scale(velocity, by=momentum)}
        weight = 1.0 if state.count == 0 else 1.0 - plain(now.dampening)
        reached = velocity if weight == 1.0 else _tree.scale(velocity, by=weight)
        direction = _tree.add(direction, reached) if now.nesterov else reached
    return direction, before, _tree.add(cotangent, direction, scale=decay) if decay else cotangent, {}

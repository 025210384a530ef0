"""The pullback of an optimizer's update in closed form, where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlo import _tree
from mlo.optimizer._abstract import AbstractOptimizer, OptimizerState, plain
from mlo.optimizer._apply import at
from mlo.optimizer._arithmetic import is_one, is_zero
from mlo.optimizer._read import Read
from mlo.optimizer._sgd import SGD

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream
    from mlo.optimizer._arithmetic import Setting


def has_closed_pullback(optimizer: AbstractOptimizer) -> bool:
    """Whether `pulled_back` knows the formula: SGD that neither clips, nor groups parameters, nor reads options."""
    clips = optimizer.clip_norm is not None or optimizer.clip_value is not None
    return isinstance(optimizer, SGD) and not (clips or optimizer.groups or Read in map(type, vars(optimizer).values()))


def pulled_back(
    optimizer: AbstractOptimizer, iteration: int, state: OptimizerState, cotangent: Tree, moments: Upstream
) -> tuple[Tree, Upstream, Tree, Upstream] | None:
    """From cotangents on w' and s' of a step of `updated` to those on its gradient g, on s, and on w with g held fixed.

    For SGD, with λ on w' and m on the momentum buffer (zero where it is absent), and c = 1 − dampening (1 at first):

        b̄' = m − η λ,                 ḡ = c b̄'                   (Nesterov: b̄' = m − η·momentum·λ,  ḡ = c b̄' − η λ)
        b̄ = momentum · b̄',            w̄ = λ + decay · ḡ

    The same numbers as automatic differentiation, without evaluating the update: of `state` the count alone is asked for.
    The last are those on levels that options are read from: none. None for other optimizers, see `has_closed_pullback`.
    """
    if not has_closed_pullback(optimizer):
        return None
    now = at(optimizer, iteration)
    assert isinstance(now, SGD)
    direction, velocity = _pulled(now, _has_momentum(optimizer), state.count, cotangent, moments)
    before: Upstream = {} if velocity is None else {"momentum": _tree.scale(velocity, by=plain(now.momentum))}
    decay = plain(now.weight_decay)
    return direction, before, _tree.add(cotangent, direction, scale=decay) if not is_zero(decay) else cotangent, {}


def multiple_of_cotangent(optimizer: AbstractOptimizer, iteration: int, count: int) -> Setting | None:
    """κ where a step of `updated`, the `count`-th from 0, pulls λ on w' back to ḡ = κλ on its gradient.

    With nothing on the moments, of SGD with c as in `pulled_back`: κ = −cη, and −η(1 + momentum) with Nesterov's method.
    None for other optimizers, see `has_closed_pullback`.
    """
    if not has_closed_pullback(optimizer):
        return None
    now = at(optimizer, iteration)
    assert isinstance(now, SGD)
    rate = plain(now.learning_rate)
    if now.nesterov:
        return -rate * (1.0 + plain(now.momentum))
    undampened = count == 0 or not _has_momentum(optimizer)
    return -rate if undampened else -rate * (1.0 - plain(now.dampening))


def _has_momentum(optimizer: AbstractOptimizer) -> bool:
    """Whether there is a momentum buffer, as `SGD.init` decides."""
    assert isinstance(optimizer, SGD)
    return not is_zero(optimizer.momentum)


def _pulled(now: SGD, has_momentum: bool, count: int, cotangent: Tree, moments: Upstream) -> tuple[Tree, Tree | None]:
    """ḡ and b̄' of `pulled_back`; without momentum there is no b̄'."""
    rate = plain(now.learning_rate)
    weight = 1.0 if count == 0 else 1.0 - plain(now.dampening)
    if has_momentum and not now.nesterov and "momentum" in moments:
        velocity = _tree.add(moments["momentum"], cotangent, scale=-rate)
        return velocity if is_one(weight) else _tree.scale(velocity, by=weight), velocity
    direction = _tree.scale(cotangent, by=-rate)
    if not has_momentum:
        return direction, None
    velocity = _tree.scale(direction, by=plain(now.momentum)) if now.nesterov else direction
    velocity = _tree.add(moments["momentum"], velocity) if "momentum" in moments else velocity
    reached = velocity if is_one(weight) else _tree.scale(velocity, by=weight)
    return _tree.add(direction, reached) if now.nesterov else reached, velocity

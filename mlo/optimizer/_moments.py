"""The two moments that Adam and AdamW share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlo import _tree
from mlo._late import scalars
from mlo.optimizer._abstract import OptimizerState
from mlo.optimizer._arithmetic import add_product, add_quotient, fitted, mixed
from mlo.optimizer._root import root

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree
    from mlo.optimizer._arithmetic import Setting


def two_moments(parameters: Tree) -> OptimizerState:
    """Both at zero."""
    return OptimizerState(moments={"first": _tree.zeros(parameters), "second": _tree.zeros(parameters)})


def adaptive_step(
    gradient: Tree,
    state: OptimizerState,
    parameters: Tree,
    *,
    rate: Setting,
    betas: tuple[Setting, Setting],
    epsilon: Setting,
) -> tuple[Tree, OptimizerState]:
    """m, v and w as in `Adam`, where `gradient` is its g."""
    numeric: Any = scalars()
    count = state.count + 1
    beta1: Any
    beta2: Any
    beta1, beta2 = betas
    size: Any = rate / (1 - beta1**count)
    spread: Any = (1 - beta2**count) ** 0.5
    numbers = isinstance(size, float) and isinstance(spread, float) and isinstance(epsilon, (int, float))
    plain = bool(numbers and beta2 and epsilon) and numeric.may_overwrite()
    gradients, means, squares = map(_tree.named, (gradient, state.moments["first"], state.moments["second"]))
    first: list[Tensor] = []
    second: list[Tensor] = []
    moved: list[Tensor] = []
    kind, decay, least = None, beta2, epsilon
    for name, parameter in _tree.named(parameters).items():
        g = gradients[name]
        if plain:  # the same numbers, in fewer copies and conversions
            if kind != (kind := (g.dtype, g.is_cpu, type(g))):
                decay, least = numeric.scalar(beta2, *kind), numeric.scalar(epsilon, *kind)
            m = means[name].lerp(g, 1 - beta1)
            v = (squares[name] * decay).addcmul_(g, g, value=1 - beta2)
            scaled = v.sqrt().div_(spread).add_(least)
            moved.append(parameter.addcdiv(m, scaled, value=-size))
        else:
            m = mixed(means[name], g, 1 - beta1)
            v = add_product(squares[name] * beta2, g, g, scale=1 - beta2)
            scaled = root(v) / fitted(spread, v) + epsilon
            moved.append(add_quotient(parameter, m, scaled, scale=-fitted(size, parameter)))
        first.append(m)
        second.append(v)
    moments = {"first": _tree.rebuild(parameters, first), "second": _tree.rebuild(parameters, second)}
    return _tree.rebuild(parameters, moved), OptimizerState(count=count, moments=moments)

"""The two moments that Adam and AdamW share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlo import _tree
from mlo.optimizer._abstract import OptimizerState
from mlo.optimizer._root import root

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree


def two_moments(parameters: Tree) -> OptimizerState:
    """Both at zero."""
    return OptimizerState(moments={"first": _tree.zeros(parameters), "second": _tree.zeros(parameters)})


def adaptive_step(
    gradient: Tree,
    state: OptimizerState,
    parameters: Tree,
    *,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
) -> tuple[Tree, OptimizerState]:
    """m, v and w as in `Adam`, where `gradient` is its g."""
    count = state.count + 1
    beta1, beta2 = betas
    first = _tree.apply(lambda m, g: m.lerp(g, 1 - beta1), state.moments["first"], gradient)
    second = _tree.apply(lambda v, g: (v * beta2).addcmul(g, g, value=1 - beta2), state.moments["second"], gradient)
    size = rate / (1 - beta1**count)
    spread = (1 - beta2**count) ** 0.5

    def move(parameter: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return parameter.addcdiv(m, root(v) / spread + epsilon, value=-size)

    updated = _tree.apply(move, parameters, first, second)
    return updated, OptimizerState(count=count, moments={"first": first, "second": second})

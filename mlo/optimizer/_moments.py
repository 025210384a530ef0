"""The two moments that Adam and AdamW share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlo import _tree
from mlo.optimizer._abstract import OptimizerState
from mlo.optimizer._arithmetic import add_product, add_quotient, mixed
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
    count = state.count + 1
    beta1, beta2 = betas
    first = _tree.apply(lambda m, g: mixed(m, g, 1 - beta1), state.moments["first"], gradient)
    second = _tree.apply(lambda v, g: add_product(v * beta2, g, g, scale=1 - beta2), state.moments["second"], gradient)
    size = rate / (1 - beta1**count)
    spread = (1 - beta2**count) ** 0.5

    def move(parameter: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return add_quotient(parameter, m, root(v) / spread + epsilon, scale=-size)

    updated = _tree.apply(move, parameters, first, second)
    return updated, OptimizerState(count=count, moments={"first": first, "second": second})

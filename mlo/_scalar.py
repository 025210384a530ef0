"""A number beside tensors, as a tensor itself where that gives the same and costs less.

`tensor * 0.9` makes a float64 tensor of the number and converts it, at every call. Beside a small tensor that takes as
long as the product itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from mlo._modes import may_overwrite

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree

_KINDS = (torch.float32, torch.float64)
"""Where a number is rounded to the type of the tensor before it is used. Beside shorter types it is not."""


@lru_cache(maxsize=256)
def scalar(number: float, dtype: torch.dtype, is_cpu: bool, kind: type[Tensor]) -> float | Tensor:
    """`number` for a tensor of that type, place and class: zero-dimensional where that is of use, or `number` itself.

    Products, quotients and sums come out the same bit for bit. For where `may_overwrite` allows it: a tensor is there for
    all that is recorded, traced or transformed. Not for 0, whose two signs would be taken for each other.
    """
    if not (is_cpu and kind is torch.Tensor and dtype in _KINDS):
        return number
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=dtype, device="cpu")


def scaled(tree: Tree, by: float) -> Tree:
    """by · tree."""
    named = isinstance(tree, (dict, Mapping))
    if not (by and may_overwrite()):
        return {name: tensor * by for name, tensor in tree.items()} if named else tree * by
    if not named:
        return tree * scalar(by, tree.dtype, tree.is_cpu, type(tree))
    return {name: tensor * scalar(by, tensor.dtype, tensor.is_cpu, type(tensor)) for name, tensor in tree.items()}


def combined(
    tensors: Mapping[str, Tensor], others: Mapping[str, Tensor], by: float, scale: float
) -> Mapping[str, Tensor]:
    """by · tensor + scale · other for each of `tensors`; what the product gave is written to where that is allowed."""
    if not may_overwrite():
        return {name: (tensor * by).add(others[name], alpha=scale) for name, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    for name, one in tensors.items():
        two = others[name]
        product = one * (scalar(by, one.dtype, one.is_cpu, type(one)) if by else by)
        # Of zero-dimensional tensors another type may win.
        found[name] = product.add_(two, alpha=scale) if product.dtype is two.dtype else product.add(two, alpha=scale)
    return found

"""Arithmetic on trees: one tensor, or tensors by name. Written by hand: a generic tree library costs 8 % of a small step.

Trees combined with each other must have the same names; the result has the first one's order. The functions that every
step calls spell their loops out: on small problems a call for every tensor is what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import methodcaller
from typing import TYPE_CHECKING

from mlo._late import scalars

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream

_NUMEL: Callable[[Tensor], int] = methodcaller("numel")
_DETACH: Callable[[Tensor], Tensor] = methodcaller("detach")
_MAPPINGS = (dict, Mapping)
"""What is no dict is asked whether it is a mapping, which takes six times as long."""


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of `tree`, in its order."""
    return [*tree.values()] if isinstance(tree, _MAPPINGS) else [tree]


def named(tree: Tree) -> Mapping[str, Tensor]:
    """The tensors of `tree` by name; a single one has the empty name."""
    return tree if isinstance(tree, _MAPPINGS) else {"": tree}


def rebuild(tree: Tree, tensors: Iterable[Tensor]) -> Tree:
    """A tree shaped like `tree` that holds `tensors`, given in the order of `leaves(tree)`."""
    if isinstance(tree, _MAPPINGS):
        return dict(zip(tree, tensors, strict=True))
    (tensor,) = tensors
    return tensor


def apply(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    """`function` of the corresponding tensors of `trees`."""
    first, *others = trees
    if not isinstance(first, _MAPPINGS):
        return function(*trees)
    if not others:
        return {name: function(tensor) for name, tensor in first.items()}
    if len(others) == 1:
        table = _table(others[0])
        return {name: function(tensor, table[name]) for name, tensor in first.items()}
    tables = [_table(other) for other in others]
    return {name: function(tensor, *[table[name] for table in tables]) for name, tensor in first.items()}


def _tensor(tree: Tree) -> Tensor:
    if isinstance(tree, _MAPPINGS):
        raise TypeError("a single tensor cannot be combined with a tree of tensors by name")
    return tree


def _table(tree: Tree) -> Mapping[str, Tensor]:
    if not isinstance(tree, _MAPPINGS):
        raise TypeError("a tree of tensors by name cannot be combined with a single tensor")
    return tree


def add(tree: Tree, other: Tree, *, scale: float | Tensor = 1.0) -> Tree:
    """tree + scale · other; `scale` is a number or a zero-dimensional tensor."""
    if not isinstance(scale, (int, float)):
        return apply(lambda one, two: one + scale * two, tree, other)
    if not isinstance(tree, _MAPPINGS):
        return tree.add(_tensor(other), alpha=scale)
    table = _table(other)
    return {name: tensor.add(table[name], alpha=scale) for name, tensor in tree.items()}


def combined(tree: Tree, other: Tree, *, by: float | Tensor, scale: float | Tensor) -> Tree:
    """by · tree + scale · other, in one copy where that is allowed."""
    if not (isinstance(by, (int, float)) and isinstance(scale, (int, float))):
        return add(apply(lambda tensor: tensor * by, tree), other, scale=scale)
    if isinstance(tree, _MAPPINGS):
        return scalars().combined(tree, _table(other), by, scale)
    return scalars().combined({"": tree}, {"": _tensor(other)}, by, scale)[""]


def subtract(tree: Tree, other: Tree) -> Tree:
    """tree − other."""
    if not isinstance(tree, _MAPPINGS):
        return tree - _tensor(other)
    table = _table(other)
    return {name: tensor - table[name] for name, tensor in tree.items()}


def difference(above: Upstream, below: Upstream) -> Upstream:
    """above − below, tree by tree; one that is absent is zero."""
    found = {name: subtract(tree, below[name]) if name in below else tree for name, tree in above.items()}
    return found | {name: scale(tree, by=-1.0) for name, tree in below.items() if name not in above}


def scale(tree: Tree, *, by: float | Tensor) -> Tree:
    """by · tree."""
    if isinstance(by, float):
        return scalars().scaled(tree, by)
    return {name: tensor * by for name, tensor in tree.items()} if isinstance(tree, _MAPPINGS) else tree * by


def zeros(tree: Tree) -> Tree:
    """Zeros shaped like `tree`."""
    return apply(lambda tensor: tensor.new_zeros(tensor.shape), tree)


def detach(tree: Tree) -> Tree:
    """`tree` without its history."""
    return dict(zip(tree, map(_DETACH, tree.values()), strict=True)) if isinstance(tree, _MAPPINGS) else tree.detach()


def inner(tree: Tree, other: Tree) -> Tensor:
    """Σ treeᵢ · otherᵢ, a zero-dimensional tensor."""
    products = [(one * two).sum() for one, two in zip(leaves(tree), leaves(other), strict=True)]
    return _sum(products)


def norm(tree: Tree) -> Tensor:
    """The Euclidean norm over all entries, a zero-dimensional tensor."""
    return _sum([(tensor * tensor).sum() for tensor in leaves(tree)]).sqrt()


def alike(tree: Tree, other: Tree) -> bool:
    """Whether the two have the same names, and under each a tensor of the same shape, type and device."""
    if isinstance(tree, _MAPPINGS) != isinstance(other, _MAPPINGS):
        return False
    one, two = named(tree), named(other)
    return one.keys() == two.keys() and all(
        (tensor.shape, tensor.dtype, tensor.device) == (two[name].shape, two[name].dtype, two[name].device)
        for name, tensor in one.items()
    )


def size(tree: Tree) -> int:
    """How many numbers `tree` holds."""
    return sum(map(_NUMEL, tree.values())) if isinstance(tree, _MAPPINGS) else tree.numel()


def total(trees: Iterable[Tree]) -> Tree:
    """The sum of at least one tree."""
    first, *others = trees
    for other in others:
        first = add(first, other)
    return first


def _sum(tensors: list[Tensor]) -> Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result

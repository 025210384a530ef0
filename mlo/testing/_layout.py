"""How a level keeps its numbers: one tensor or tensors by name, against one flat vector for linear algebra."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree

Layout: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes in the order of the tree; a single tensor has the empty name. The flat order is that of the names."""

UNUSED = "unused"
"""The tensor that no objective reads."""


def size(layout: Layout) -> int:
    """How many numbers are read; those of `UNUSED` are not."""
    return sum(prod(shape) for name, shape in layout if name != UNUSED)


def flat(tree: Tree) -> Tensor:
    """The numbers that are read, in the order of the names. Differentiable."""
    if not isinstance(tree, Mapping):
        return tree.reshape(-1)
    return torch.cat([tree[name].reshape(-1) for name in sorted(tree) if name != UNUSED])


def shaped(layout: Layout, vector: Tensor) -> Tree:
    """`vector` as a tree; the tensor that is not read is zero."""
    tensors: dict[str, Tensor] = {}
    begin = 0
    for name, shape in sorted(layout):
        end = begin if name == UNUSED else begin + prod(shape)
        tensors[name] = vector.new_zeros(shape) if name == UNUSED else vector[begin:end].reshape(shape).clone()
        begin = end
    return tensors[""] if "" in tensors else {name: tensors[name] for name, _ in layout}


def with_unused(layout: Layout) -> Layout:
    """`layout` with a tensor that no objective reads; a single tensor becomes a tree of two."""
    return (*((name or "only", shape) for name, shape in layout), (UNUSED, (2,)))


def in_words(layout: Layout) -> str:
    """`3 numbers` or `{weight: 2 × 2, shift: scalar}`."""
    if layout[0][0] == "":
        count = size(layout)
        return "a zero-dimensional tensor" if layout[0][1] == () else f"{count} number{'s' * (count > 1)}"
    return "{" + ", ".join(f"{name}: {' × '.join(map(str, shape)) or 'scalar'}" for name, shape in layout) + "}"

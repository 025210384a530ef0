"""Pullbacks as flat vectors, and how alike two of them are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mlo import _tree

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream


def flattened(upstream: Upstream) -> dict[str, Tensor]:
    """Cotangents by the level they belong to, each as one vector."""
    return {name: wide(flat(tree)) for name, tree in upstream.items()}


def cosine(one: Mapping[str, Tensor] | None, two: Mapping[str, Tensor] | None) -> float | None:
    """Of the angle between two pullbacks, all reads together; None where one is missing or zero."""
    if one is None or two is None:
        return None
    product = sum(((one[name] * two[name]).sum().item() for name in one if name in two), 0.0)
    lengths = _length(one) * _length(two)
    return max(-1.0, min(1.0, product / lengths)) if lengths else None


def relative_error(found: Mapping[str, Tensor], right: Mapping[str, Tensor] | None) -> float | None:
    """‖found − right‖ / ‖right‖, all reads together; None where there is nothing to compare with."""
    if right is None or not (length := _length(right)):
        return None
    names = {**found, **right}
    difference = {name: _part(found, right, name) - _part(right, found, name) for name in names}
    return _length(difference) / length


def _part(of: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> Tensor:
    return of[name] if name in of else torch.zeros_like(other[name])


def _length(vectors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(vector.square().sum().item() for vector in vectors.values()))


def is_finite(vectors: Mapping[str, Tensor]) -> bool:
    """Whether every number is."""
    return all(bool(vector.isfinite().all()) for vector in vectors.values())


def wide(vector: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return vector if vector.device.type == "mps" else vector.double()


def flat(tree: Tree) -> Tensor:
    """All entries in one vector, tensor after tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in _tree.leaves(tree)])


def shaped(tree: Tree, vector: Tensor) -> Tree:
    """The entries of `vector` in the shape of `tree`."""
    tensors = _tree.leaves(tree)
    parts = vector.split([tensor.numel() for tensor in tensors])
    return _tree.rebuild(tree, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])

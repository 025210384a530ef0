"""The types that travel through `mlo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Tree: TypeAlias = "Tensor | Mapping[str, Tensor]"
"""The variables of one level, or anything shaped like them: one tensor, or tensors by name."""

Upstream: TypeAlias = "Mapping[str, Tree]"
"""Cotangents by the name of the level they belong to; a level that is not reached is absent."""

Objective: TypeAlias = "Callable[[Any, Any], Any]"
"""`objective(values, batch)` giving a loss, or a loss and a mapping of measurements."""

Constraint: TypeAlias = Literal["softplus", "sigmoid", "softmax"]
"""Where variables must stay: above 0, between 0 and 1, or a distribution along the last dimension."""

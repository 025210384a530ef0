"""What every optimizer provides. No file of this package imports torch: tensors bring their own arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What an optimizer remembers: how many updates it has made, and its moments, each shaped like the variables."""

    count: int = 0
    moments: Mapping[str, Tree] = field(default_factory=dict[str, "Tree"])


class AbstractOptimizer(ABC):
    """A pair of pure functions; its fields are its settings.

    `update` is differentiable in the gradient, the moments and the parameters: an unrolled response is its composition,
    and `FiniteDifference` pulls a cotangent through its last application.
    """

    @abstractmethod
    def init(self, parameters: Tree) -> OptimizerState:
        """The state before the first update: moments are zero."""

    @abstractmethod
    def update(self, gradient: Tree, state: OptimizerState, parameters: Tree) -> tuple[Tree, OptimizerState]:
        """New parameters and new state; the arguments are left as they are."""


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` > 0."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def at_least_zero(name: str, value: float) -> None:
    """Raise ValueError unless `value` ≥ 0."""
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def fraction(name: str, value: float) -> None:
    """Raise ValueError unless 0 ≤ `value` < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")

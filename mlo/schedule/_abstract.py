"""What every schedule provides. No file of this package imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias


class AbstractSchedule(ABC):
    """A number for every iteration, `schedule(iteration)`; its fields are its settings.

    Iterations count from 1, as everywhere: where `torch.optim.lr_scheduler` has been stepped n times, the iteration is
    n + 1. All steps of a level in one iteration share the number. In Python durations are iterations; in a graph file they
    may also be `{epochs: n}`.
    """

    @abstractmethod
    def __call__(self, iteration: int) -> float:
        """The number at `iteration`, counted from 1."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest number it ever gives, whatever its durations are."""


Number: TypeAlias = float | AbstractSchedule
"""An option that is a number, or a schedule of one."""


def number_at(value: Number, iteration: int) -> float:
    """`value` at `iteration`."""
    return value(iteration) if isinstance(value, AbstractSchedule) else value


def bounds_of(value: Number) -> tuple[float, float]:
    """The least and the greatest that `value` ever is."""
    return value.bounds if isinstance(value, AbstractSchedule) else (value, value)

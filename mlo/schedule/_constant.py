"""The same number throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from mlo.schedule._abstract import AbstractSchedule


@final
@dataclass(frozen=True, kw_only=True)
class Constant(AbstractSchedule):
    """`value` at every iteration: what a graph that extends another one writes to switch a schedule off."""

    value: float

    def __call__(self, iteration: int) -> float:
        return self.value

    @property
    def bounds(self) -> tuple[float, float]:
        """See `AbstractSchedule`."""
        return self.value, self.value

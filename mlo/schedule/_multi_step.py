"""A number that is multiplied by a factor at given times."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import final

from mlo.schedule._abstract import AbstractSchedule
from mlo.schedule._epochs import Epochs, known, written


@final
@dataclass(frozen=True, kw_only=True)
class MultiStep(AbstractSchedule):
    r"""`start`, multiplied by `factor` as each of the durations in `at` has passed.

        start · factorⁿ at iteration t,    n = #{a ∈ at : a < t}

    With `at=(100,)` iterations 1 to 100 have `start` and the 101st has start · factor, as with
    `torch.optim.lr_scheduler.MultiStepLR`.

    - `factor`: positive; the default divides by ten.
    - `at`: increasing numbers of iterations, or `{epochs: [60, 120, 160]}`.

    Raises ValueError for a factor that is not positive and for durations that do not increase.
    """

    start: float
    factor: float = 0.1
    at: tuple[int, ...] | Epochs

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor must be positive, got {self.factor}")
        times = written(self.at)
        if any(time < 1 for time in times) or any(one >= two for one, two in pairwise(times)):
            raise ValueError(f"at must be increasing durations of at least 1, got {list(times)}")

    def __call__(self, iteration: int) -> float:
        return self.start * self.factor ** sum(time < iteration for time in known("at", self.at))

    @property
    def bounds(self) -> tuple[float, float]:
        """See `AbstractSchedule`."""
        last = self.start * self.factor ** len(written(self.at))
        return min(self.start, last), max(self.start, last)

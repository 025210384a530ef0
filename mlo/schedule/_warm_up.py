"""A straight line up to where another schedule begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from mlo.schedule._abstract import AbstractSchedule, bounds_of, number_at
from mlo.schedule._epochs import Epochs, known, refuse_several, written


@final
@dataclass(frozen=True, kw_only=True)
class WarmUp(AbstractSchedule):
    r"""From `start` in a straight line to where `then` begins, and on with `then` (Goyal et al. 2017, §2.2).

        start + (then(1) − start) · (t − 1)/over at iterations t ≤ over,    then(t − over) after that

    Durations in `then` count from the end of the warm-up. This is `torch.optim.lr_scheduler.SequentialLR` of a `LinearLR`
    and `then`.

    - `start`: the number at the first iteration. At the default, 0, a learning rate makes that one idle.
    - `over`: a number of iterations, or `{epochs: 5}`.
    - `then`: a schedule, or a number to stay at.

    Raises ValueError for a duration below 1.
    """

    start: float = 0.0
    over: int | Epochs
    then: float | AbstractSchedule

    def __post_init__(self) -> None:
        refuse_several("over", written(self.over))

    def __call__(self, iteration: int) -> float:
        (over,) = known("over", self.over)
        if iteration > over:
            return number_at(self.then, iteration - over)
        return self.start + (number_at(self.then, 1) - self.start) * (iteration - 1) / over

    @property
    def bounds(self) -> tuple[float, float]:
        """See `AbstractSchedule`."""
        low, high = bounds_of(self.then)
        return min(self.start, low), max(self.start, high)

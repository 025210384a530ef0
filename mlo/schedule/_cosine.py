"""Half a period of a cosine, from one number to another."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import final

from mlo.schedule._abstract import AbstractSchedule
from mlo.schedule._epochs import Epochs, known, refuse_several, written


@final
@dataclass(frozen=True, kw_only=True)
class Cosine(AbstractSchedule):
    r"""From `start` to `end` along a cosine (Loshchilov and Hutter 2017, Eq. 5, without restarts).

        end + (start − end) · (1 + cos(π · min(t − 1, over)/over))/2 at iteration t

    `torch.optim.lr_scheduler.CosineAnnealingLR` with T_max = over, which this equals until then; it would rise again where
    this one stays at `end`.

    - `over`: a number of iterations, usually all there are, or `{epochs: 200}`.

    Raises ValueError for a duration below 1.
    """

    start: float
    end: float = 0.0
    over: int | Epochs

    def __post_init__(self) -> None:
        refuse_several("over", written(self.over))

    def __call__(self, iteration: int) -> float:
        (over,) = known("over", self.over)
        return self.end + (self.start - self.end) * (1 + cos(pi * min(iteration - 1, over) / over)) / 2

    @property
    def bounds(self) -> tuple[float, float]:
        """See `AbstractSchedule`."""
        return min(self.start, self.end), max(self.start, self.end)

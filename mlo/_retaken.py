"""Steps of which only some positions were kept: the others are taken again when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from mlo._step import Position, Step, Surroundings, take
from mlo.optimizer import has_closed_pullback

if TYPE_CHECKING:
    from mlo._level import Level
    from mlo._objective import Record


@final
class Retaken(Sequence[Step]):
    """The steps of `records`, in order, from every `every`-th position: `starts[i]` is where step i·every started.

    Asking for a step takes those of its stretch again, with the same draws and so to the same bits, and keeps them until a
    step of another stretch is asked for: every − 1 gradients for each stretch, when they are asked for in order or in
    reverse.
    """

    def __init__(
        self, level: Level, around: Surroundings, starts: Sequence[Position], records: Sequence[Record], every: int
    ) -> None:
        self._level, self._around, self._every = level, around, every
        self._starts, self._records = starts, records
        self._moments = level.optimizer is None or not has_closed_pullback(level.optimizer)
        self._stretch: tuple[int, list[Step]] = (-1, [])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        found = range(len(self))[index]
        if isinstance(found, range):
            return [self[each] for each in found]
        number, place = divmod(found, self._every)
        if self._stretch[0] != number:
            self._stretch = (-1, [])  # let go of the last one before the next is built
            self._stretch = (number, self._take(number))
        return self._stretch[1][place]

    def _take(self, number: int) -> list[Step]:
        records = self._records[number * self._every : (number + 1) * self._every]
        at, steps = self._starts[number], list[Step]()
        for record in records:
            if steps:
                at = take(self._level, at, self._around, steps[-1].record)[0]
                steps[-1] = steps[-1].bare(moments=self._moments)
            steps.append(Step(self._level, self._around, at, record, None))
        return steps

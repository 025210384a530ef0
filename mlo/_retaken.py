"""Steps of which only some positions were kept: the others are taken again when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from mlo._step import Position, Step, Surroundings, take

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
        positions = [self._starts[number]]
        for record in records[:-1]:
            positions.append(take(self._level, positions[-1], self._around, record)[0])
        return [Step(self._level, self._around, *pair, None) for pair in zip(positions, records, strict=True)]

"""A plain iterable or `DataLoader`, for users who have one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, final

from mlo._errors import UserError
from mlo.stream._abstract import AbstractStream, Draw


@final
class Iterated(AbstractStream):
    """The batches of `iterable` in the order it gives them, over and over.

    It remembers its place, so a draw depends on what was drawn before, and a run that is resumed sees other batches than
    an uninterrupted one. The draws of the last iteration can be asked for again. Raises `UserError` when a pass gives
    nothing.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable
        self._place: Iterator[Any] = iter(())
        self._drawn: dict[Draw, Any] = {}

    def draw(self, which: Draw) -> Any:
        """The next batch, or the one that this draw has been before."""
        if any(draw.iteration != which.iteration for draw in self._drawn):
            self._drawn = {}
        if which not in self._drawn:
            self._drawn[which] = self._next(which)
        return self._drawn[which]

    def _next(self, which: Draw) -> Any:
        for attempt in range(2):
            for batch in self._place:
                return batch
            if attempt == 0:
                self._place = iter(self._iterable)
        where = f"at iteration {which.iteration}"
        raise UserError(f"stream '{which.stream}' has run out of batches {where} and cannot start again")

    def draws_per_epoch(self) -> float | None:
        """Its length, if it has one."""
        return float(len(self._iterable)) if isinstance(self._iterable, Sized) else None

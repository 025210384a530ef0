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
    an uninterrupted one. Raises `UserError` when a pass gives nothing.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable
        self._place: Iterator[Any] = iter(())

    def draw(self, which: Draw) -> Any:
        """The next batch."""
        for attempt in range(2):
            for batch in self._place:
                return batch
            if attempt == 0:
                self._place = iter(self._iterable)
        raise UserError(f"stream '{which.stream}' has run out of batches and cannot start again")

    def draws_per_epoch(self) -> float | None:
        """Its length, if it has one."""
        return float(len(self._iterable)) if isinstance(self._iterable, Sized) else None

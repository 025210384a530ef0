"""The same batch every time."""

from __future__ import annotations

from typing import Any, final

from mlo.stream._abstract import AbstractStream, Draw


@final
class Constant(AbstractStream):
    """A whole data set, or anything else that is not drawn."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def draw(self, which: Draw) -> Any:
        """See the class."""
        return self._batch

    def draws_per_epoch(self) -> float:
        """One."""
        return 1.0

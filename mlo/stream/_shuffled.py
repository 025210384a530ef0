"""Passes over a data set, each in an order of its own."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _random
from mlo._errors import UserError
from mlo.stream._abstract import AbstractStream, Draw, rows, take

if TYPE_CHECKING:
    from torch import Tensor


@final
class Shuffled(AbstractStream):
    """Batches of `size` from endless passes over `data`, each pass in a fresh random order, no sample left out.

    A batch may begin in one pass and end in the next. Inner step s follows passes of its own, so that the batch at
    (iteration, step) does not depend on how many steps any level takes. Data stay where they are, and so do batches.
    """

    def __init__(self, data: Any, *, size: int) -> None:
        if size < 1:
            raise UserError(f"a batch needs at least one sample, got {size}")
        self._data = data
        self._rows = rows(data)
        self._size = size
        self._order = lru_cache(maxsize=4)(self._permutation)

    def draw(self, which: Draw) -> Any:
        """See the class."""
        start = (which.iteration - 1) * self._size
        first, last = start // self._rows, (start + self._size - 1) // self._rows
        order = torch.cat(
            [self._order(which.seed, which.stream, which.step, epoch) for epoch in range(first, last + 1)]
        )
        return take(self._data, order[start - first * self._rows :][: self._size])

    def draws_per_epoch(self) -> float:
        """Samples over batch size."""
        return self._rows / self._size

    def _permutation(self, seed: int, stream: str, step: int, epoch: int) -> Tensor:
        return torch.randperm(self._rows, generator=_random.generator(seed, stream, step, "epoch", epoch))

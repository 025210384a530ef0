"""Batches in which every class is equally likely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from mlo._errors import UserError
from mlo.stream._abstract import AbstractStream, Draw, rows, take

if TYPE_CHECKING:
    from torch import Tensor


@final
class Balanced(AbstractStream):
    """Batches of `size`, each sample drawn by a class at random and then one of its samples at random.

    `labels`, int64 [samples], are the classes of `data`; only classes that occur are drawn.
    """

    def __init__(self, data: Any, labels: Tensor, *, size: int) -> None:
        if size < 1:
            raise UserError(f"a batch needs at least one sample, got {size}")
        self._data = data
        self._size = size
        self._rows = rows(data)
        self._members = torch.argsort(labels, stable=True)
        counts = torch.bincount(labels)
        self._counts = counts[counts > 0]
        self._starts = self._counts.cumsum(0) - self._counts

    def draw(self, which: Draw) -> Any:
        """See the class."""
        generator = which.generator()
        classes = torch.randint(len(self._counts), (self._size,), generator=generator)
        uniform = torch.rand(self._size, generator=generator, dtype=torch.float64)
        within = (uniform * self._counts[classes]).long()
        return take(self._data, self._members[self._starts[classes] + within])

    def draws_per_epoch(self) -> float:
        """Samples over batch size: as many draws as there are samples, though not each sample once."""
        return self._rows / self._size

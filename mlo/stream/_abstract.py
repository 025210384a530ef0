"""What a stream provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _random
from mlo._errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class Draw:
    """Which draw is meant: of which stream, at which iteration (from 1) and inner step (from 0), under which seed."""

    seed: int
    stream: str
    iteration: int
    step: int = 0

    def generator(self) -> torch.Generator:
        """A generator that belongs to this draw alone."""
        return _random.generator(self.seed, self.stream, self.iteration, self.step)


class AbstractStream(ABC):
    """A source of batches. The same `Draw` gives the same batch, whatever was drawn before."""

    @abstractmethod
    def draw(self, which: Draw) -> Any:
        """The batch of this draw: tensors, alone or in tuples and mappings."""

    @abstractmethod
    def draws_per_epoch(self) -> float | None:
        """How many draws pass over the data once; None for a stream that has no end."""


def rows(data: Any) -> int:
    """How many samples `data` holds: the common first dimension of its tensors. Raises `UserError` if they differ."""
    sizes = {tensor.shape[0] for tensor in _tensors(data)}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"a stream needs tensors with one common, positive number of samples, got {sorted(sizes)}")
    return sizes.pop()


def take(data: Any, index: Tensor) -> Any:
    """The samples `index` of `data`, in the same tuples and mappings."""
    if isinstance(data, torch.Tensor):
        return data[index]
    if isinstance(data, Mapping):
        return {name: take(part, index) for name, part in data.items()}
    if hasattr(data, "_fields"):
        return type(data)(*(take(part, index) for part in data))
    return tuple(take(part, index) for part in data)


def _tensors(data: Any) -> list[Tensor]:
    if isinstance(data, torch.Tensor):
        return [data]
    parts = data.values() if isinstance(data, Mapping) else data
    return [tensor for part in parts for tensor in _tensors(part)]

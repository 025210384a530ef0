"""Random numbers as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from mlo.stream._abstract import AbstractStream, Draw

if TYPE_CHECKING:
    import torch


@final
class Noise(AbstractStream):
    """What `make(generator)` draws: latent vectors, uniforms, Gumbel noise, in tensors, tuples or mappings."""

    def __init__(self, make: Callable[[torch.Generator], Any]) -> None:
        self._make = make

    def draw(self, which: Draw) -> Any:
        """See the class."""
        return self._make(which.generator())

    def draws_per_epoch(self) -> None:
        """Noise has no end."""
        return

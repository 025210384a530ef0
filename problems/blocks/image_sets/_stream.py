"""Batches from a part of an image set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

import mlo

if TYPE_CHECKING:
    from problems.blocks.image_sets._sets import Part


def stream(part: Part, *, size: int, device: torch.device, dtype: torch.dtype) -> mlo.stream.AbstractStream:
    """Batches of `size` from endless passes over `part`, each pass in a fresh random order.

    A batch is `images` [size, channels, height, width] in [0, 1] and `labels`, int64 [size]. A training part is augmented
    in the set's standard way. Order and augmentation depend on the draw alone, so that a run can be resumed bit for bit.
    """
    order = mlo.stream.Shuffled(torch.arange(len(part)), size=size)
    return _Drawn(order, part, device=device, dtype=dtype)


def in_order(part: Part, *, size: int, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Every image of `part` once, not augmented, in batches of at most `size`: what evaluations read."""
    for index in torch.arange(len(part)).split(size):
        yield _batch(part, index, None, device=device, dtype=dtype)


@final
class _Drawn(mlo.stream.AbstractStream):
    """The images whose places in `part` another stream draws."""

    def __init__(
        self, order: mlo.stream.AbstractStream, part: Part, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._order = order
        self._part = part
        self._device, self._dtype = device, dtype

    def draw(self, which: mlo.stream.Draw) -> dict[str, Tensor]:
        """See `stream`."""
        index: Tensor = self._order.draw(which)
        draws = None
        if self._part.augmented:
            generator = replace(which, stream=f"{which.stream}.standard").generator()
            draws = torch.rand(len(index), self._part.images.draws, generator=generator)
        return _batch(self._part, index, draws, device=self._device, dtype=self._dtype)

    def draws_per_epoch(self) -> float | None:
        """As many as the order's."""
        return self._order.draws_per_epoch()


def _batch(
    part: Part, index: Tensor, draws: Tensor | None, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    pixels = part.images.take(part.index[index], draws)
    return {
        "images": pixels.to(device).to(dtype) / part.images.strongest,
        "labels": part.labels[index].to(device),
    }

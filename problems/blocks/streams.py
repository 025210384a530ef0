"""Streams that the papers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

import mlo
from problems.blocks.jitter import Jitter, uniform_draws

Transform: TypeAlias = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Images and draws to images: `problems.blocks.consistency.strong`."""

Draws: TypeAlias = Callable[..., Mapping[str, Tensor]]
"""What a transform draws for `count` images, `draws(count, generator=…)`."""


def in_dtype(draws: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`draws` with what is floating in `dtype`: transforms draw in torch's default one."""
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in draws.items()}


@final
class Jittered(mlo.stream.AbstractStream):
    """The batches of another stream with their `images` jittered, each image by draws of its own.

    A class that has one image is seen turned, stretched and shifted in a new way each time.
    """

    def __init__(self, stream: mlo.stream.AbstractStream, jitter: Jitter, *, background: float = -1.0) -> None:
        self._stream = stream
        self._jitter = jitter
        self._background = background

    def draw(self, which: mlo.stream.Draw) -> Any:
        """A mapping like the other stream's."""
        batch = self._stream.draw(which)
        images = batch["images"]
        generator = replace(which, stream=f"{which.stream}.jitter").generator()
        draws = uniform_draws(len(images), generator=generator).to(device=images.device, dtype=images.dtype)
        return {**batch, "images": self._jitter(images, draws, background=self._background)}

    def draws_per_epoch(self) -> float | None:
        """As many as the other stream's."""
        return self._stream.draws_per_epoch()


@final
class Transformed(mlo.stream.AbstractStream):
    """The batches of another stream with their `images` transformed, each image by draws of its own."""

    def __init__(self, stream: mlo.stream.AbstractStream, transform: Transform, draws: Draws) -> None:
        self._stream = stream
        self._transform = transform
        self._draws = draws

    def draw(self, which: mlo.stream.Draw) -> Any:
        """A mapping like the other stream's."""
        batch = self._stream.draw(which)
        images = batch["images"]
        generator = replace(which, stream=f"{which.stream}.transform").generator()
        draws = self._draws(len(images), generator=generator)
        return {
            **batch,
            "images": self._transform(images, {name: each.to(images.device) for name, each in draws.items()}),
        }

    def draws_per_epoch(self) -> float | None:
        """As many as the other stream's."""
        return self._stream.draws_per_epoch()


@final
class WhenDrawn(mlo.stream.AbstractStream):
    """The stream that `make` makes, made when it is first asked for: a graph pays only for the streams it names.

    A ValueError of `make`, which begins with a setting of the data, is told as a UserError.
    """

    def __init__(self, make: Callable[[], mlo.stream.AbstractStream]) -> None:
        self._make = make

    @cached_property
    def _stream(self) -> mlo.stream.AbstractStream:
        try:
            return self._make()
        except ValueError as error:
            raise mlo.UserError(f"data: {error}") from error

    def draw(self, which: mlo.stream.Draw) -> Any:
        """A batch of the other stream's."""
        return self._stream.draw(which)

    def draws_per_epoch(self) -> float | None:
        """As many as the other stream's."""
        return self._stream.draws_per_epoch()

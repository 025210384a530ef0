"""Streams that the papers share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import mlo
from problems.blocks.jitter import Jitter, uniform_draws


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

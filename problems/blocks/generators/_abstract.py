"""What all generators of images share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

import mlo


class AbstractGenerator(nn.Module, ABC):
    """Images from latents and labels, G(z, y): differentiable in z, to second order.

    - `latent`: the size of z, which is standard normal.
    - `labels`: how many labels there are; None if it takes none. Labels handed to it then are ignored.
    - `channels`, `size`: of the images.
    """

    def __init__(self, *, latent: int, labels: int | None, channels: int, size: int) -> None:
        super().__init__()
        if min(latent, channels, size) < 1 or (labels is not None and labels < 1):
            raise ValueError(
                f"latent is {latent}, the labels {labels}, the channels {channels} and the size {size}; "
                "each must be at least 1"
            )
        self.latent = latent
        self.labels = labels
        self.channels = channels
        self.size = size

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images [n, channels, size, size] in [0, 1].

        - `latents`: [n, latent].
        - `labels`: int64 [n]; or weights of the labels [n, labels], in which the images are differentiable.

        Raises `UserError` where one of them does not fit.
        """
        if latents.ndim != 2 or latents.shape[1] != self.latent:
            raise mlo.UserError(
                f"latents of shape {list(latents.shape)} for a generator whose latent has {self.latent} numbers: it takes "
                f"[n, {self.latent}]; make the stream's `latent` and the generator's the same"
            )
        if self.labels is None:
            return self.images(latents, None)
        if labels is None:
            raise mlo.UserError(f"a generator of {self.labels} classes needs labels, and none are given")
        shape = (len(latents), self.labels) if labels.is_floating_point() else (len(latents),)
        if tuple(labels.shape) != shape:
            raise mlo.UserError(
                f"labels of shape {list(labels.shape)} for {len(latents)} latents: whole numbers [n], or weights "
                f"[n, {self.labels}]"
            )
        return self.images(latents, labels)

    @abstractmethod
    def images(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """The images, of latents and labels that fit."""


def embedded(table: nn.Embedding, labels: Tensor) -> Tensor:
    """A row of `table` for each label, [n, size]: of whole numbers [n] one of them, of weights [n, labels] their sum."""
    return labels @ table.weight if labels.is_floating_point() else table(labels)


def sides(size: int) -> tuple[int, ...]:
    """Sides of the maps from the smallest to `size`, each twice the one before: 2, 4, 8; 4, 8, 16, 32; 7, 14, …, 224.

    The image is halved while it is even and what is left has at least 4 pixels, or 2 of an image below 16.
    """
    least = max(2, min(4, size // 4))
    found = [size]
    while found[-1] % 2 == 0 and found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return tuple(reversed(found))


def widths(size: int, width: int) -> tuple[int, ...]:
    """Channels at each of `sides(size)`: `width` at the largest, doubled at each smaller one up to sixteenfold."""
    steps = len(sides(size))
    return tuple(width * min(2 ** (steps - 1 - step), 16) for step in range(steps))

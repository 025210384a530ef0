"""A small diffusion model whose samples are a differentiable function of its first noise."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu

import mlo
from problems.blocks.generators._abstract import AbstractGenerator, embedded, widths
from problems.blocks.generators._ddim import Schedule, ddim

FREQUENCIES = 16


@final
class Diffusion(AbstractGenerator):
    """Images by DDIM from a latent that is the first noise, channels · size² numbers (Ho et al. 2020; Song et al. 2021).

    A U-Net says the velocity of noisy images; the images lie in [−1, 1] there, and what comes out is clamped to [0, 1]:
    where a pixel is clamped it has no derivative. `velocity` is what the training objective needs.

    Cost: `steps` evaluations of the U-Net, and as many in a derivative.

    - `latent`: None, or channels · size².
    - `labels`: None for an unconditional model.
    - `width`: channels at full size; twice as many at each smaller side, at most sixteen times as many.
    - `steps`: of the solver.
    - `schedule`: how noise is added, see `signal`.

    Raises ValueError for another latent, or without a step.
    """

    def __init__(
        self,
        *,
        latent: int | None = None,
        labels: int | None = 10,
        channels: int = 1,
        size: int = 8,
        width: int = 16,
        steps: int = 10,
        schedule: Schedule = "cosine",
    ) -> None:
        numbers = channels * size * size
        if latent not in (None, numbers):
            raise ValueError(
                f"latent is {latent}; it is the first noise, of {channels} · {size} · {size} = {numbers} numbers"
            )
        if steps < 1:
            raise ValueError(f"steps is {steps}; the solver takes at least one")
        super().__init__(latent=numbers, labels=labels, channels=channels, size=size)
        self.steps = steps
        self.schedule: Schedule = schedule
        self.network = _UNet(labels=labels, channels=channels, size=size, width=width)

    def images(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """See the base."""
        noise = latents.unflatten(1, (self.channels, self.size, self.size))
        found = ddim(lambda x, t: self.network(x, t, labels), noise, schedule=self.schedule, steps=self.steps)
        return ((found + 1) / 2).clamp(0, 1)

    def forward(self, latents: Tensor, labels: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """Images; with `times` [n] velocities of `latents` that are noisy images, both [n, channels, size, size]."""
        if times is None:
            return super().forward(latents, labels)
        if self.labels is not None and labels is None:
            raise mlo.UserError(f"a generator of {self.labels} classes needs labels, and none are given")
        return self.network(latents, times, labels)


@final
class _UNet(nn.Module):
    """Noisy images, times and labels to velocities: residual blocks down and up, joined at each side (Ho et al., App. B)."""

    def __init__(self, *, labels: int | None, channels: int, size: int, width: int) -> None:
        super().__init__()
        found = tuple(reversed(widths(size, width)))
        condition = 4 * width
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.embedding = None if labels is None else nn.Embedding(labels, condition)
        self.first = nn.Conv2d(channels, width, kernel_size=3, padding=1)
        self.down = nn.ModuleList(
            _Block(inputs, outputs, condition=condition) for inputs, outputs in pairwise((width, *found))
        )
        self.middle = _Block(found[-1], found[-1], condition=condition)
        self.up = nn.ModuleList(
            _Block(below + beside, beside, condition=condition)
            for below, beside in pairwise((found[-1], *reversed(found)))
        )
        self.norm = _norm(width)
        self.last = _zero(nn.Conv2d(width, channels, kernel_size=3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """See the class."""
        condition = self.time(_waves(t))
        if self.embedding is not None and labels is not None:
            condition = condition + embedded(self.embedding, labels)
        condition = silu(condition)
        features, beside = self.first(x), list[Tensor]()
        for depth, block in enumerate(self.down):
            features = block(features if depth == 0 else avg_pool2d(features, 2), condition)
            beside.append(features)
        features = self.middle(features, condition)
        for depth, block in enumerate(self.up):
            features = features if depth == 0 else interpolate(features, scale_factor=2)
            features = block(torch.cat((features, beside.pop()), dim=1), condition)
        return self.last(silu(self.norm(features)))


@final
class _Block(nn.Module):
    """GroupNorm, SiLU, convolution, twice, beside the shortcut; the condition scales and shifts the second norm."""

    def __init__(self, inputs: int, outputs: int, *, condition: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.convolution1 = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        self.film = nn.Linear(condition, 2 * outputs)
        self.norm2 = _norm(outputs)
        self.convolution2 = _zero(nn.Conv2d(outputs, outputs, kernel_size=3, padding=1))
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, kernel_size=1)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        gain, bias = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        inner = self.convolution1(silu(self.norm1(features)))
        inner = self.convolution2(silu((1 + gain) * self.norm2(inner) + bias))
        return inner + (features if self.shortcut is None else self.shortcut(features))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """`layer` with all its numbers zero: each block starts as its shortcut, the network as the velocity 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _waves(t: Tensor) -> Tensor:
    """sin and cos of t at frequencies from 1 to 1,000 radians, [n, 2 · FREQUENCIES]."""
    frequencies = torch.logspace(0, 3, FREQUENCIES, dtype=t.dtype, device=t.device)
    angles = t[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)

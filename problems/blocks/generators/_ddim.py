"""How a diffusion model adds noise, and the deterministic solver that takes it away."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Schedule: TypeAlias = Literal["cosine", "linear"]
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From noisy images x [n, …] and times t [n] to velocities v [n, …]."""

OFFSET = 0.008
SLOWEST, FASTEST = 0.1, 20.0


def signal(t: Tensor, schedule: Schedule) -> Tensor:
    r"""ᾱ(t), the share of the image in the variance of x_t = √ᾱ x₀ + √(1 − ᾱ) ε, from 1 at t = 0 to nearly 0 at t = 1.

    - `cosine`: cos²(π/2 · (t + s)/(1 + s)) over its value at 0, s = 0.008 (Nichol and Dhariwal 2021, Eq. 17); 0 at t = 1.
    - `linear`: exp(−β₀t − (β₁ − β₀)t²/2), β₀ = 0.1, β₁ = 20: what DDPM's linear schedule of 1,000 steps tends to
      (Song et al. 2021, App. C); 4e-5 at t = 1.
    """
    if schedule == "linear":
        return torch.exp(-SLOWEST * t - (FASTEST - SLOWEST) * t.square() / 2)
    at_zero = math.cos(math.pi / 2 * OFFSET / (1 + OFFSET)) ** 2
    return (torch.cos(math.pi / 2 * (t + OFFSET) / (1 + OFFSET)).square() / at_zero).clamp(0, 1)


def noisy(images: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """√ᾱ x₀ + √(1 − ᾱ) ε (DDPM, Eq. 4), for shares ᾱ [n] of the image."""
    kept = share.reshape(-1, *[1] * (images.ndim - 1))
    return kept.sqrt() * images + (1 - kept).sqrt() * noise


def image_and_noise(x: Tensor, v: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """x̂₀ = √ᾱ x − √(1 − ᾱ) v and ε̂ = √(1 − ᾱ) x + √ᾱ v, of the velocity v = √ᾱ ε − √(1 − ᾱ) x₀ (Salimans and Ho 2022).

    Nothing is divided by √ᾱ, which is 0 where the image has become noise.
    """
    kept = share.reshape(-1, *[1] * (x.ndim - 1))
    image, noise = kept.sqrt(), (1 - kept).sqrt()
    return image * x - noise * v, noise * x + image * v


def ddim(velocity: Velocity, noise: Tensor, *, schedule: Schedule, steps: int) -> Tensor:
    """DDIM with η = 0 (Song et al. 2021, Eq. 12): x_s = √ᾱ_s x̂₀ + √(1 − ᾱ_s) ε̂, from noise at t = 1 to images at t = 0.

    The times are equally spaced. Differentiable in `noise`, as often as `velocity` is. Error: O(1/steps) against the
    probability flow, of which this is an explicit one-step scheme of first order. Cost: one velocity a step.
    """
    times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
    x = noise
    for now, then in pairwise(times):
        t = now.expand(len(x))
        image, rest = image_and_noise(x, velocity(x, t), signal(t, schedule))
        x = noisy(image, rest, signal(then.expand(len(x)), schedule))
    return x

"""Small affine jitter of images, a pure function of explicit draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

DRAWS = 5  # rotation, two log-scales, two shifts


@final
@dataclass(frozen=True, kw_only=True)
class Jitter:
    r"""Turn, stretch and shift each image by its own draws u ∈ [−1, 1]⁵, resampled bilinearly about the centre:

        out(p) = in(A p + t),    A = diag(s^u₁, s^u₂) · R(u₀ · rotation),    t = shift · (u₃, u₄).

    All-zero magnitudes, or all-zero draws, are the identity, bit for bit. Outside the image lies the background.
    Written as a sum over hat functions, Σ_ij hat(y−i) hat(x−j) in(i, j), rather than with `grid_sample`: on images this
    small it costs no more, and it has derivatives of every order in the image and, almost everywhere, in the draws.

    - `rotation`: the largest angle, in degrees.
    - `scale`: s − 1, the largest relative stretch of an axis.
    - `shift`: the largest shift of an axis, in pixels.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0

    def __call__(self, images: Tensor, draws: Tensor, *, background: float = -1.0) -> Tensor:
        """The jittered images, [batch, channels, height, width], from images of that shape and draws [batch, 5]."""
        height, width = images.shape[-2:]
        y, x = _centred(height, images), _centred(width, images)
        angle = draws[:, 0] * math.radians(self.rotation)
        cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
        stretch_y, stretch_x = ((1 + self.scale) ** draws[:, 1:3])[:, :, None, None].unbind(1)
        shift_y, shift_x = (self.shift * draws[:, 3:5])[:, :, None, None].unbind(1)
        # Where each output pixel reads, [batch, height, width].
        rows = stretch_y * (cos * y[:, None] + sin * x) + shift_y
        columns = stretch_x * (cos * x - sin * y[:, None]) + shift_x
        along_rows = torch.einsum("bhwi,bcij->bchwj", _hat(rows, y), images - background)
        return (along_rows * _hat(columns, x)[:, None]).sum(-1) + background


def uniform_draws(count: int, *, generator: torch.Generator) -> Tensor:
    """Draws for `count` images, uniform in [−1, 1], [count, 5]."""
    return 2 * torch.rand(count, DRAWS, generator=generator) - 1


def _centred(size: int, like: Tensor) -> Tensor:
    """Pixel centres with the origin in the middle of the image, [size]."""
    return torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2


def _hat(at: Tensor, centres: Tensor) -> Tensor:
    """Bilinear weight of every pixel centre at every place, max(0, 1 − |at − centre|), [batch, height, width, size]."""
    return (1 - (at[..., None] - centres).abs()).clamp(min=0)

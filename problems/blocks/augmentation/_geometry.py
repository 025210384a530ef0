"""Shears, translations and rotations of images, each image by its own magnitude, resampled bilinearly."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

SHEAR = 0.3
"""Of the distance from the centre line, at magnitude 1."""
TRANSLATION = 0.45
"""Of the image's width or height, at magnitude 1."""
ROTATION = 30.0
"""Degrees, at magnitude 1."""


def shear_x(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """out(y, x) = in(y, x + 0.3 s m y), about the centre of the image."""
    y, x = _centres(images)
    return _read(images, y, x + _each(signs * magnitudes) * SHEAR * y)


def shear_y(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """out(y, x) = in(y + 0.3 s m x, x), about the centre of the image."""
    y, x = _centres(images)
    return _read(images, y + _each(signs * magnitudes) * SHEAR * x, x)


def translate_x(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """out(y, x) = in(y, x − 0.45 s m · width): sign 1 moves to the right."""
    y, x = _centres(images)
    return _read(images, y, x - _each(signs * magnitudes) * TRANSLATION * images.shape[-1])


def translate_y(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """out(y, x) = in(y − 0.45 s m · height, x): sign 1 moves downwards."""
    y, x = _centres(images)
    return _read(images, y - _each(signs * magnitudes) * TRANSLATION * images.shape[-2], x)


def rotate(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """out(p) = in(R p) with the rotation R by 30° s m about the centre: sign 1 turns against the clock."""
    y, x = _centres(images)
    angle = _each(signs * magnitudes) * math.radians(ROTATION)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _read(images, sin * x + cos * y, cos * x - sin * y)


def _each(numbers: Tensor) -> Tensor:
    """A number for each image, [n, 1, 1]."""
    return numbers[:, None, None]


def _centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres with the origin in the middle of the image, y [height, 1] and x [1, width]."""
    height, width = images.shape[-2:]
    y = torch.arange(height, dtype=images.dtype, device=images.device) - (height - 1) / 2
    x = torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2
    return y[:, None], x[None]


def _read(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The images [n, c, h, w] read bilinearly at centred places that broadcast to [n, h, w]; outside lies 0.

    By four gathers rather than `grid_sample`, whose coordinates relative to the size do not hold a pixel's centre
    exactly: there magnitude 0 is not the identity bit for bit. Derivatives of every order, forward mode too.
    """
    count, channels, height, width = images.shape
    # A ring of zeros around the image makes reading outside no special case: beyond it everything is 0.
    ringed = pad(images, (1, 1, 1, 1)).flatten(2)
    row, below = _split(y, height)
    column, right = _split(x, width)
    corner = (row * (width + 2) + column).expand(count, height, width).reshape(count, 1, -1)

    def pixel(offset: int) -> Tensor:
        index = (corner + offset).expand(-1, channels, -1)
        return ringed.gather(2, index).view(count, channels, height, width)

    below, right = below.unsqueeze(-3), right.unsqueeze(-3)
    upper = pixel(0) * (1 - right) + pixel(1) * right
    lower = pixel(width + 2) * (1 - right) + pixel(width + 3) * right
    return upper * (1 - below) + lower * below


def _split(at: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Centred places as a pixel of the ringed image, and how far they lie towards the next one, in [0, 1]."""
    place = (at + ((size - 1) / 2 + 1)).clamp(0, size + 1)
    pixel = place.detach().floor().clamp(max=size)
    return pixel.long(), place - pixel

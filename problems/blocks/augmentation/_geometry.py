"""Shears, translations and rotations of images, each image by its own, resampled bilinearly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

SHEAR = 0.3
"""Of the distance from the centre line, at magnitude 1."""
TRANSLATION = 0.45
"""Of the image's width or height, at magnitude 1."""
ROTATION = 30.0
"""Degrees, at magnitude 1."""


def shear_x(amounts: Tensor, height: int, width: int) -> Tensor:
    """out(y, x) = in(y, x + 0.3 a y), about the centre of the image."""
    del height, width
    return _matrices(amounts, y=(1, 0, 0), x=(SHEAR * amounts, 1, 0))


def shear_y(amounts: Tensor, height: int, width: int) -> Tensor:
    """out(y, x) = in(y + 0.3 a x, x), about the centre of the image."""
    del height, width
    return _matrices(amounts, y=(1, SHEAR * amounts, 0), x=(0, 1, 0))


def translate_x(amounts: Tensor, height: int, width: int) -> Tensor:
    """out(y, x) = in(y, x − 0.45 a · width): above 0 to the right."""
    del height
    return _matrices(amounts, y=(1, 0, 0), x=(0, 1, -TRANSLATION * width * amounts))


def translate_y(amounts: Tensor, height: int, width: int) -> Tensor:
    """out(y, x) = in(y − 0.45 a · height, x): above 0 downwards."""
    del width
    return _matrices(amounts, y=(1, 0, -TRANSLATION * height * amounts), x=(0, 1, 0))


def rotate(amounts: Tensor, height: int, width: int) -> Tensor:
    """out(p) = in(R p) with the rotation R by 30° a about the centre: above 0 against the clock."""
    del height, width
    angle = math.radians(ROTATION) * amounts
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _matrices(amounts, y=(cos, sin, 0), x=(-sin, cos, 0))


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """out(y, x) = in(M (y, x, 1)ᵀ), origin in the middle of the image, read bilinearly; outside lies 0.

    Images [n, c, h, w], each with its own M of `matrices` [n, 2, 3]; M = (1 0 0; 0 1 0) is the identity, bit for bit.

    By four gathers rather than `grid_sample`, whose coordinates relative to the size do not hold a pixel's centre
    exactly. Derivatives of every order, almost everywhere in M, in reverse and in forward mode.
    """
    count, channels, height, width = images.shape
    y, x = _centres(height, images)[:, None], _centres(width, images)
    (yy, yx, y1), (xy, xx, x1) = (row.unbind(1) for row in matrices[..., None, None].unbind(1))
    row, below = _split(yy * y + yx * x + y1, height)
    column, right = _split(xy * y + xx * x + x1, width)
    # A ring of zeros around the image makes reading outside no special case: beyond it everything is 0.
    ringed = pad(images, (1, 1, 1, 1)).flatten(2)
    corner = (row * (width + 2) + column).flatten(1)[:, None]

    def pixel(offset: int) -> Tensor:
        return ringed.gather(2, (corner + offset).expand(-1, channels, -1)).view(count, channels, height, width)

    below, right = below[:, None], right[:, None]
    upper = pixel(0) * (1 - right) + pixel(1) * right
    lower = pixel(width + 2) * (1 - right) + pixel(width + 3) * right
    return upper * (1 - below) + lower * below


MATRICES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}
"""M [n, 2, 3] of each operation, from amounts a = sign · magnitude [n] and the images' height and width."""


def _matrices(amounts: Tensor, *, y: tuple[Tensor | float, ...], x: tuple[Tensor | float, ...]) -> Tensor:
    """M from its two rows, of numbers and of one number for each image."""
    entries = [entry if isinstance(entry, Tensor) else torch.full_like(amounts, entry) for entry in (*y, *x)]
    return torch.stack(entries, dim=1).unflatten(1, (2, 3))


def _centres(size: int, like: Tensor) -> Tensor:
    """Pixel centres with the origin in the middle of the image, [size]."""
    return torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2


def _split(at: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Centred places as a pixel of the ringed image, and how far they lie towards the next one, in [0, 1]."""
    place = (at + ((size - 1) / 2 + 1)).clamp(0, size + 1)
    pixel = place.detach().floor().clamp(max=size)
    return pixel.long(), place - pixel

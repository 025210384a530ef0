"""Enhancements: each image is moved away from, or towards, a version of itself that lacks something."""

from __future__ import annotations

import kornia.enhance
from torch import Tensor
from torch.nn.functional import pad

STRENGTH = 0.9
"""How far the factor is from 1 at magnitude 1: it lies in [0.1, 1.9]."""


def color(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """grey + (1 + 0.9 s m)(x − grey), clipped, with grey = 0.299 R + 0.587 G + 0.114 B. Nothing on grey images."""
    return kornia.enhance.adjust_saturation_with_gray_subtraction(images, _factors(magnitudes, signs))


def contrast(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """mean + (1 + 0.9 s m)(x − mean), clipped, with the mean grey of the image."""
    return kornia.enhance.adjust_contrast_with_mean_subtraction(images, _factors(magnitudes, signs))


def brightness(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """(1 + 0.9 s m) x, clipped."""
    return kornia.enhance.adjust_brightness_accumulative(images, _factors(magnitudes, signs))


def sharpness(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """blur(x) + (1 + 0.9 s m)(x − blur(x)), clipped; the outermost pixels stay.

    The blur is PIL's, 3×3 with weight 5/13 in the middle and 1/13 elsewhere. Written as x + 0.9 s m (x − blur(x)), which
    is x at m = 0, bit for bit; kornia's, which starts from the blur, is not.
    """
    if min(images.shape[-2:]) < 3:
        return images
    # Sums of slices, 17 times as fast as `avg_pool2d` at 224×224.
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    square = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    details = (9 * images[..., 1:-1, 1:-1] - square) / 13
    amounts = (STRENGTH * signs * magnitudes)[:, None, None, None]
    return (images + amounts * pad(details, (1, 1, 1, 1))).clamp(0, 1)


def _factors(magnitudes: Tensor, signs: Tensor) -> Tensor:
    """1 + 0.9 s m, [n]: 1 changes nothing, 0 would leave what lacks."""
    return 1 + STRENGTH * signs * magnitudes

"""Operations on the values of pixels that are on or off, or that change in steps."""

from __future__ import annotations

import kornia.enhance
import torch
from torch import Tensor

LEVELS = 256
"""Values of a pixel in the 8 bits that solarize, posterize and equalize are defined on."""
DROPPED_BITS = 4
"""Of 8, at magnitude 1."""


def invert(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """1 − x. Has no magnitude: in force at any above 0."""
    del signs
    return torch.where(_off(magnitudes), images, 1 - images)


def autocontrast(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """(x − min)/(max − min) over each channel; a constant channel stays. Has no magnitude: in force at any above 0."""
    del signs
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    constant = low == high
    stretched = (images - low) / torch.where(constant, 1, high - low)
    return torch.where(_off(magnitudes) | constant, images, stretched)


def equalize(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """Each channel's histogram over 256 levels made flat. Has no magnitude: in force at any above 0.

    As PIL defines it, a channel in which fewer than 255 pixels lie below its brightest level stays as it is, so that
    8×8 images never change. Straight-through in the image.
    """
    del signs
    if images.shape[-2:].numel() < LEVELS:
        return images
    exact = images.detach()
    flat = kornia.enhance.equalize(exact)
    # kornia multiplies and divides what it leaves alone by 255.
    unchanged = ((flat - exact).abs() * LEVELS < 1e-3).flatten(2).all(2)[:, :, None, None]
    return _passing(torch.where(_off(magnitudes) | unchanged, exact, flat), images)


def solarize(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """1 − x where x ≥ t, x elsewhere, with t = 256/255 (1 − m). Straight-through in the magnitude.

    Just above 1 at m = 0, the threshold spares white pixels too; at 0 it spares none.
    """
    del signs
    threshold = LEVELS / (LEVELS - 1) * (1 - magnitudes.detach())
    return _passing(kornia.enhance.solarize(images, threshold), magnitudes[:, None, None, None])


def posterize(images: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """The 8 − round(4m) highest of each pixel's 8 bits. Straight-through in the magnitude and in the image."""
    del signs
    bits = 8 - (DROPPED_BITS * magnitudes.detach()).round().long()
    exact = images.detach()
    return _passing(kornia.enhance.posterize(exact, bits), images, magnitudes[:, None, None, None])


def _off(magnitudes: Tensor) -> Tensor:
    """Where an operation without magnitude is not in force, [n, 1, 1, 1]."""
    return (magnitudes == 0)[:, None, None, None]


def _passing(values: Tensor, *inputs: Tensor) -> Tensor:
    """`values`, bit for bit, with derivative one more in each input (straight-through, Bengio et al. 2013)."""
    for x in inputs:
        values = values + (x - x.detach())
    return values

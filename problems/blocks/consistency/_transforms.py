"""Weak and strong transforms of images in [0, 1]: pure functions of images and of draws, which are plain tensors.

All that is random is in the draws, an entry an image: the same draws give the same images, bit for bit, and draws of zero
leave images as they are, bit for bit. Derivatives in the images are those of `problems.blocks.augmentation`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import mlo
from problems.blocks.augmentation import OPERATIONS, apply_each

CHOICES: tuple[str, ...] = tuple(name for name in OPERATIONS if name != "invert")
"""The operations of RandAugment (Cubuk et al. 2020), FixMatch and TrivialAugment, which have the identity besides."""

AUGMIX: tuple[str, ...] = tuple(
    name for name in CHOICES if name not in ("color", "contrast", "brightness", "sharpness")
)
"""Those of AugMix (Hendrycks et al. 2020), which leaves out what its corruptions resemble."""


def weak(images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Each image mirrored or not, then shifted by whole pixels: out(y, x) = in(y + shift_y, x + shift_x), 0 outside.

    A random crop of the image with a black border, as MP-SSL has it (§4.1, "horizontal flip and random crop"). Linear in the
    images.

    - `images`: [n, channels, height, width].
    - `draws`: from `weak_draws` for n images.
    """
    height, width = images.shape[-2:]
    shift, flip = draws["shift"].round().long(), draws["flip"] > 0.5
    rows = torch.arange(height, device=images.device) + shift[:, :1]
    columns = torch.arange(width, device=images.device) + shift[:, 1:]
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    read = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return torch.where(inside[:, None], read.view_as(images), 0)


def weak_draws(count: int, *, shift: int = 1, flip: bool = False, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws of `weak` for `count` images.

    - `shift`: the largest shift, in pixels; each of −shift … shift is as likely. FixMatch: an eighth of the image.
    - `flip`: whether half of the images are mirrored, left to right. Digits and letters must not be.

    Gives `shift` [count, 2], how far below and to the right is read, and `flip` [count] of 0 and 1. Raises UserError for a
    shift below 0.
    """
    if shift < 0:
        raise mlo.UserError(f"shift={shift}: the largest shift is a number of pixels, 0 or more")
    by = torch.randint(-shift, shift + 1, (count, 2), generator=generator).to(torch.get_default_dtype())
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(by.dtype)
    return {"shift": by, "flip": mirrored if flip else torch.zeros_like(mirrored)}


def strong(images: Tensor, draws: Mapping[str, Tensor], *, fill: float = 0.5) -> Tensor:
    """Each image under its own operations one after the other, and a square of it cut out: T of PCR (MGR, Eq. 5).

    - `images`: [n, 1 or 3 channels, height, width] in [0, 1].
    - `draws`: from `strong_draws`, `rand_augment_draws` or `trivial_augment_draws` for n images.
    - `fill`: what takes the place of the square; FixMatch's grey.
    """
    return _cut_out(_in_turn(images, draws), draws["cutout"].to(images.dtype), fill)


def strong_draws(
    count: int,
    *,
    operations: int = 2,
    weakest: float = 0.0,
    strongest: float = 1.0,
    cutout: float = 0.0,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Draws of `strong` for `count` images: RandAugment with magnitudes at random, as UDA and FixMatch have it.

    An operation is one of the fourteen of RandAugment, the identity among them, all as likely. Magnitudes are uniform.

    - `operations`: how many one after the other.
    - `weakest`, `strongest`: the range of magnitudes, in [0, 1]: `problems.blocks.augmentation`.
    - `cutout`: the side of the square as a share of the image's, about a place anywhere in the image; 0 for none. UDA and
      FixMatch take 0.5 on 32×32; MGR names RandAugment alone.

    Gives `operation` [count, operations], places in `OPERATIONS`; `magnitude`, 0 for the identity, and `sign`, both
    [count, operations]; `cutout` [count, 3], the middle from the top and from the left and the side, as shares of the
    image's. Raises UserError for a setting out of range.
    """
    if operations < 0:
        raise mlo.UserError(f"operations={operations}: it must be 0 or more")
    if not 0 <= weakest <= strongest <= 1:
        raise mlo.UserError(f"weakest={weakest}, strongest={strongest}: magnitudes lie in [0, 1], the weakest first")
    if not 0 <= cutout <= 2:
        raise mlo.UserError(f"cutout={cutout}: a share of the image's side, from 0 to 2")
    uniform = torch.rand(count, operations, generator=generator)
    drawn = _operations((count, operations), weakest + (strongest - weakest) * uniform, generator=generator)
    middle = torch.rand(count, 2, generator=generator)
    return {**drawn, "cutout": torch.cat([middle, torch.full((count, 1), cutout)], 1)}


def rand_augment_draws(
    count: int, *, operations: int = 2, magnitude: float = 0.3, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draws of `strong` for RandAugment (Cubuk et al. 2020): `operations` N, and one `magnitude` for all, M/30 of theirs."""
    return strong_draws(count, operations=operations, weakest=magnitude, strongest=magnitude, generator=generator)


def trivial_augment_draws(count: int, *, levels: int = 31, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws of `strong` for TrivialAugment (Müller and Hutter 2021): one operation, its magnitude one of k/(levels − 1).

    The ranges are those of `problems.blocks.augmentation`, "RA" in the paper's words and not "wide". Raises UserError for
    fewer than two levels.
    """
    if levels < 2:
        raise mlo.UserError(f"levels={levels}: magnitudes are chosen from at least two")
    chosen = torch.randint(levels, (count, 1), generator=generator) / (levels - 1)
    return {**_operations((count, 1), chosen, generator=generator), "cutout": torch.zeros(count, 3)}


def augmix(images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """x + m Σ_k w_k (chain_k(x) − x): a mixture of chains of operations, mixed with the image (AugMix, Alg. 1).

    The transform alone, without AugMix's Jensen-Shannon loss.

    - `images`: [n, 1 or 3 channels, height, width] in [0, 1].
    - `draws`: from `augmix_draws` for n images.
    """
    count, chains = draws["weight"].shape
    flat = {name: draws[name].flatten(0, 1) for name in ("operation", "magnitude", "sign")}
    changed = _in_turn(images.repeat_interleave(chains, 0), flat).unflatten(0, (count, chains))
    weights = (draws["mixing"][:, None] * draws["weight"]).to(images.dtype)
    return images + (weights[:, :, None, None, None] * (changed - images[:, None])).sum(1)


def augmix_draws(
    count: int, *, chains: int = 3, depth: int = 3, strongest: float = 0.3, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draws of `augmix` for `count` images.

    Each chain has one to `depth` operations, as likely; w ~ Dirichlet(1, …, 1), m ~ Beta(1, 1).

    - `strongest`: magnitudes are uniform up to this: AugMix's severity/10, 3 of 10.

    Gives `operation`, `magnitude` and `sign` [count, chains, depth], magnitude 0 beyond a chain's end; `weight` w
    [count, chains]; `mixing` m [count]. Raises UserError for a setting out of range.
    """
    if chains < 1 or depth < 1:
        raise mlo.UserError(f"chains={chains}, depth={depth}: both must be at least 1")
    if not 0 <= strongest <= 1:
        raise mlo.UserError(f"strongest={strongest}: magnitudes lie in [0, 1]")
    shape = count, chains, depth
    places = torch.tensor([OPERATIONS.index(name) for name in AUGMIX])
    operation = places[torch.randint(len(AUGMIX), shape, generator=generator)].to(torch.get_default_dtype())
    length = torch.randint(1, depth + 1, (count, chains, 1), generator=generator)
    magnitude = strongest * torch.rand(shape, generator=generator) * (torch.arange(depth) < length)
    exponential = -torch.log1p(-torch.rand(count, chains, generator=generator))
    exponential = exponential.clamp(min=torch.finfo(exponential.dtype).tiny)
    return {
        "operation": operation,
        "magnitude": magnitude,
        "sign": _signs(shape, generator=generator),
        "weight": exponential / exponential.sum(1, keepdim=True),
        "mixing": torch.rand(count, generator=generator),
    }


def _in_turn(images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Each image under its own operations, [n, operations], one after the other."""
    chosen = draws["operation"].round().long()
    for stage in range(chosen.shape[1]):
        images = apply_each(images, chosen[:, stage], draws["magnitude"][:, stage], draws["sign"][:, stage])
    return images


def _cut_out(images: Tensor, cutout: Tensor, fill: float) -> Tensor:
    """`fill` where both |y − middle_y| and |x − middle_x| are below half a side, shares of the image's [n, 3]."""
    height, width = images.shape[-2:]
    half = cutout[:, 2:] / 2

    def within(size: int, middle: Tensor) -> Tensor:
        places = (torch.arange(size, dtype=images.dtype, device=images.device) + 0.5) / size
        return (places - middle).abs() < half

    square = within(height, cutout[:, :1])[:, None, :, None] & within(width, cutout[:, 1:2])[:, None, None, :]
    return torch.where(square, fill, images)


def _operations(shape: tuple[int, ...], magnitudes: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
    """Operations of RandAugment at random: what is chosen beyond `CHOICES` is the identity, an operation of magnitude 0."""
    places = torch.tensor([OPERATIONS.index(name) for name in CHOICES] + [0])
    chosen = torch.randint(len(places), shape, generator=generator)
    return {
        "operation": places[chosen].to(magnitudes.dtype),
        "magnitude": torch.where(chosen < len(CHOICES), magnitudes, 0),
        "sign": _signs(shape, generator=generator),
    }


def _signs(shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """−1 or 1, as likely."""
    return (2 * torch.randint(2, shape, generator=generator) - 1).to(torch.get_default_dtype())

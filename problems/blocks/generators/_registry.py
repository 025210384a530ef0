"""Generators and discriminators by the names that graphs use, for images of a set."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from problems.blocks.generators import _elsewhere
from problems.blocks.generators._biggan import BigGANGenerator, ProjectionDiscriminator
from problems.blocks.generators._convolutional import (
    AuxiliaryDiscriminator,
    ConvolutionalDiscriminator,
    ConvolutionalGenerator,
)
from problems.blocks.generators._ddim import Schedule
from problems.blocks.generators._diffusion import Diffusion
from problems.blocks.generators._elsewhere import Interval, Signature
from problems.blocks.image_sets import ImageSets

LATENT = 64
"""The size of z where nothing else is said: that of a diffusion model of digits, so that families can be exchanged."""


def generators_for(
    found: ImageSets, *, latent: int = LATENT, labels: int | None = None
) -> dict[str, Callable[..., nn.Module]]:
    """The generators that a level can be, by name: images like this set's, in [0, 1].

    - `latent`: the size of z unless an option says otherwise.
    - `labels`: how many labels there are; None for the set's classes.
    """
    channels, wanted, drawn = found.channels, found.size, latent
    classes = found.classes if labels is None else labels

    def gan(*, latent: int = drawn, width: int = 16, embedding: int = 16) -> nn.Module:
        return ConvolutionalGenerator(
            latent=latent, width=width, embedding=embedding, labels=classes, channels=channels, size=wanted
        )

    def unconditional_gan(*, latent: int = drawn, width: int = 16) -> nn.Module:
        return ConvolutionalGenerator(latent=latent, width=width, labels=None, channels=channels, size=wanted)

    def biggan(*, latent: int = drawn, width: int = 16, embedding: int = 32) -> nn.Module:
        return BigGANGenerator(
            latent=latent, width=width, embedding=embedding, labels=classes, channels=channels, size=wanted
        )

    def diffusion(
        *,
        latent: int = drawn,
        width: int = 16,
        steps: int = 10,
        schedule: Schedule = "cosine",
        conditional: bool = True,
    ) -> nn.Module:
        labels = classes if conditional else None
        return Diffusion(
            latent=latent, width=width, steps=steps, schedule=schedule, labels=labels, channels=channels, size=wanted
        )

    def signature(
        latent: int, conditional: bool, labels: int | None, weights: bool, drawn: int | None, interval: Interval
    ) -> Signature:
        if labels is not None and not conditional:
            raise ValueError(f"labels is {labels}, and conditional is false")
        return Signature(
            latent=latent,
            labels=(classes if labels is None else labels) if conditional else None,
            weights=weights,
            channels=channels,
            size=wanted,
            drawn=drawn,
            interval=interval,
        )

    def torchscript(
        *,
        path: str,
        latent: int = drawn,
        conditional: bool = True,
        labels: int | None = None,
        weights: bool = False,
        size: int | None = None,
        interval: Interval = "unit",
    ) -> nn.Module:
        return _elsewhere.torchscript(path, signature(latent, conditional, labels, weights, size, interval))

    def exported(
        *,
        path: str,
        latent: int = drawn,
        conditional: bool = True,
        labels: int | None = None,
        weights: bool = False,
        size: int | None = None,
        interval: Interval = "unit",
    ) -> nn.Module:
        return _elsewhere.exported(path, signature(latent, conditional, labels, weights, size, interval))

    def imported(
        *,
        module: str,
        name: str = "generator",
        latent: int = drawn,
        conditional: bool = True,
        labels: int | None = None,
        weights: bool = False,
        size: int | None = None,
        interval: Interval = "unit",
    ) -> nn.Module:
        return _elsewhere.imported(module, name, signature(latent, conditional, labels, weights, size, interval))

    return {
        "gan": gan,
        "acgan": gan,
        "biggan": biggan,
        "unconditional_gan": unconditional_gan,
        "diffusion": diffusion,
        "torchscript": torchscript,
        "exported": exported,
        "imported": imported,
    }


def discriminators_for(found: ImageSets, *, labels: int | None = None) -> dict[str, Callable[..., nn.Module]]:
    """The discriminators that a level can be, by name, for images like this set's; a diffusion model has none.

    - `labels`: how many labels there are; None for the set's classes.
    """
    classes, channels, size = found.classes if labels is None else labels, found.channels, found.size

    def gan_discriminator(*, width: int = 16, normalised: bool = True) -> nn.Module:
        return ConvolutionalDiscriminator(
            width=width, normalised=normalised, labels=classes, channels=channels, size=size
        )

    def acgan_discriminator(*, width: int = 16) -> nn.Module:
        return AuxiliaryDiscriminator(width=width, labels=classes, channels=channels, size=size)

    def biggan_discriminator(*, width: int = 16) -> nn.Module:
        return ProjectionDiscriminator(width=width, labels=classes, channels=channels, size=size)

    def unconditional_gan_discriminator(*, width: int = 16, normalised: bool = True) -> nn.Module:
        return ConvolutionalDiscriminator(width=width, normalised=normalised, labels=None, channels=channels, size=size)

    made = (gan_discriminator, acgan_discriminator, biggan_discriminator, unconditional_gan_discriminator)
    return {make.__name__: make for make in made}

"""A plain convolutional generator and the discriminators beside it: conditional GAN, AC-GAN, unconditional GAN."""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from problems.blocks.generators._abstract import AbstractGenerator, embedded, sides, widths
from problems.blocks.generators._spectral import spectral


@final
class ConvolutionalGenerator(AbstractGenerator):
    """G(z, y) of the conditional GAN (Mirza and Osindero 2014) with convolutions (Radford et al. 2016).

    The label's embedding is joined to z; a linear layer makes a map of the smallest side, which blocks of nearest-neighbour
    upsampling, convolution, BatchNorm and ReLU double until the images are (tanh + 1)/2.

    - `width`: channels at full size; twice as many at each smaller side, at most sixteen times as many.
    - `embedding`: the size of a label's embedding.
    - `labels`: None for an unconditional generator.
    """

    def __init__(
        self,
        *,
        latent: int = 64,
        labels: int | None = 10,
        channels: int = 1,
        size: int = 8,
        width: int = 16,
        embedding: int = 16,
    ) -> None:
        super().__init__(latent=latent, labels=labels, channels=channels, size=size)
        first, *_ = found = widths(size, width)
        side = sides(size)[0]
        self.embedding = None if labels is None else nn.Embedding(labels, embedding)
        parts: list[nn.Module] = [
            nn.Linear(latent + (0 if labels is None else embedding), first * side * side),
            nn.Unflatten(1, (first, side, side)),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        ]
        for inputs, outputs in pairwise(found):
            convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
            parts += [nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.blocks = nn.Sequential(*parts, nn.Conv2d(found[-1], channels, kernel_size=3, padding=1), nn.Tanh())

    def images(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """See the base."""
        if self.embedding is not None and labels is not None:
            latents = torch.cat((latents, embedded(self.embedding, labels)), dim=1)
        return (self.blocks(latents) + 1) / 2


@final
class ConvolutionalDiscriminator(nn.Module):
    """D(x, y): images [n, channels, size, size] in [0, 1] and labels [n] to scores [n].

    Convolutions of stride 2 and leaky ReLUs halve the image to the smallest side; a hidden layer sees the result joined to
    the label's embedding (Mirza and Osindero 2014).

    - `width`: channels of the first convolution, at full size.
    - `labels`: None for a discriminator that does not look at labels.
    - `embedding`, `hidden`: the sizes of a label's embedding and of the hidden layer.
    - `normalised`: whether all layers are spectrally normalised.
    """

    def __init__(
        self,
        *,
        labels: int | None = 10,
        channels: int = 1,
        size: int = 8,
        width: int = 16,
        embedding: int = 16,
        hidden: int = 64,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        self.features = _Features(channels, size=size, width=width, normalised=normalised)
        self.embedding = None if labels is None else nn.Embedding(labels, embedding)
        inputs = self.features.outputs + (0 if labels is None else embedding)
        self.hidden = _layer(nn.Linear(inputs, hidden), normalised=normalised)
        self.score = _layer(nn.Linear(hidden, 1), normalised=normalised)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class."""
        features = self.features(2 * images - 1)
        if self.embedding is not None:
            assert labels is not None, "a conditional discriminator is given labels"
            features = torch.cat((features, embedded(self.embedding, labels)), dim=1)
        return self.score(leaky_relu(self.hidden(features), 0.1)).squeeze(1)


@final
class AuxiliaryDiscriminator(nn.Module):
    """The discriminator of AC-GAN (Odena et al. 2017): images to scores [n] and logits of their classes [n, labels].

    It sees no label and has to tell it; see `ConvolutionalDiscriminator`.
    """

    def __init__(self, *, labels: int = 10, channels: int = 1, size: int = 8, width: int = 16) -> None:
        super().__init__()
        self.features = _Features(channels, size=size, width=width)
        self.score = spectral(nn.Linear(self.features.outputs, 1))
        self.logits = nn.Linear(self.features.outputs, labels)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the class; `labels` are not looked at."""
        features = self.features(2 * images - 1)
        return self.score(features).squeeze(1), self.logits(features)


@final
class _Features(nn.Module):
    """Convolution and leaky ReLU at full size and at each half of it, flattened: [n, outputs]."""

    def __init__(self, channels: int, *, size: int, width: int, normalised: bool = True) -> None:
        super().__init__()
        found = tuple(reversed(widths(size, width)))
        first = nn.Conv2d(channels, width, kernel_size=3, padding=1)
        parts: list[nn.Module] = [_layer(first, normalised=normalised), nn.LeakyReLU(0.1)]
        for inputs, outputs in pairwise(found):
            convolution = nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
            parts += [_layer(convolution, normalised=normalised), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*parts, nn.Flatten())
        self.outputs = found[-1] * sides(size)[0] ** 2

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.layers(images)


def _layer(layer: nn.Module, *, normalised: bool) -> nn.Module:
    return spectral(layer) if normalised else layer

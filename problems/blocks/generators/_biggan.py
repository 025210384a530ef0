"""A residual generator with class-conditional BatchNorm, and a projection discriminator (Brock et al. 2019)."""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, relu

from problems.blocks.generators._abstract import AbstractGenerator, embedded, sides, widths
from problems.blocks.generators._conditional_norm import ConditionalBatchNorm
from problems.blocks.generators._spectral import Layer, spectral


@final
class BigGANGenerator(AbstractGenerator):
    """G(z, y) of BigGAN (App. B.1): one embedding of the label, shared by all conditional BatchNorms.

    z is cut into a piece for the first layer and one for each block; a block's condition is its piece joined to the
    embedding. A linear layer makes a map of the smallest side; residual blocks double it; the images are (tanh + 1)/2.
    All layers are spectrally normalised and start orthogonal.

    - `width`: channels at full size; twice as many at each smaller side, at most sixteen times as many.
    - `embedding`: the size of the label's embedding.

    Raises ValueError where the latent has fewer numbers than there are pieces, or the size cannot be halved.
    """

    def __init__(
        self,
        *,
        latent: int = 64,
        labels: int = 10,
        channels: int = 1,
        size: int = 8,
        width: int = 16,
        embedding: int = 32,
    ) -> None:
        super().__init__(latent=latent, labels=labels, channels=channels, size=size)
        side, found = sides(size)[0], widths(size, width)
        if len(found) < 2:
            raise ValueError(f"size is {size}; the residual blocks double a smaller map, and it cannot be halved")
        if latent < len(found):
            raise ValueError(f"latent is {latent}; each of {len(found)} pieces of it needs a number")
        each = latent // len(found)
        self.pieces = (latent - each * (len(found) - 1), *[each] * (len(found) - 1))
        self.embedding = nn.Embedding(labels, embedding)
        self.first = nn.Sequential(
            spectral(_orthogonal(nn.Linear(self.pieces[0], found[0] * side * side))),
            nn.Unflatten(1, (found[0], side, side)),
        )
        condition = each + embedding
        self.blocks = nn.ModuleList(_Up(inputs, outputs, condition=condition) for inputs, outputs in pairwise(found))
        self.norm = nn.BatchNorm2d(found[-1])
        self.last = spectral(_orthogonal(nn.Conv2d(found[-1], channels, kernel_size=3, padding=1)))

    def images(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """See the base."""
        assert labels is not None
        first, *pieces = latents.split(self.pieces, dim=1)
        shared = embedded(self.embedding, labels)
        features = self.first(first)
        for block, piece in zip(self.blocks, pieces, strict=True):
            features = block(features, torch.cat((piece, shared), dim=1))
        return (self.last(relu(self.norm(features))).tanh() + 1) / 2


@final
class ProjectionDiscriminator(nn.Module):
    """D(x, y) = ψ(h(x)) + ⟨e_y, h(x)⟩ (Miyato and Koyama 2018): images in [0, 1] and labels [n] to scores [n].

    h: residual blocks that halve the image to the smallest side, a last one that does not, ReLU, the sum over places. All
    layers and the embedding e are spectrally normalised and start orthogonal.

    - `width`: channels of the first block.
    """

    def __init__(self, *, labels: int = 10, channels: int = 1, size: int = 8, width: int = 16) -> None:
        super().__init__()
        found = tuple(reversed(widths(size, width)))
        blocks: list[nn.Module] = [_Down(channels, width, halve=False, first=True)]
        blocks += [_Down(inputs, outputs) for inputs, outputs in pairwise(found)]
        self.blocks = nn.Sequential(*blocks, _Down(found[-1], found[-1], halve=False))
        self.score = spectral(_orthogonal(nn.Linear(found[-1], 1)))
        self.embedding = spectral(_orthogonal(nn.Embedding(labels, found[-1])))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        features = relu(self.blocks(2 * images - 1)).sum(dim=(2, 3))
        return self.score(features).squeeze(1) + (embedded(self.embedding, labels) * features).sum(1)


@final
class _Up(nn.Module):
    """Conditional BatchNorm, ReLU, doubling, convolution, then without doubling, beside a doubled 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int, *, condition: int) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(inputs, condition=condition)
        self.convolution1 = _convolution(inputs, outputs)
        self.norm2 = ConditionalBatchNorm(outputs, condition=condition)
        self.convolution2 = _convolution(outputs, outputs)
        self.shortcut = _convolution(inputs, outputs, kernel=1)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        inner = self.convolution1(interpolate(relu(self.norm1(features, condition)), scale_factor=2))
        inner = self.convolution2(relu(self.norm2(inner, condition)))
        return inner + interpolate(self.shortcut(features), scale_factor=2)  # a 1×1 convolution commutes with doubling


@final
class _Down(nn.Module):
    """ReLU, convolution, twice, and average pooling, beside a 1×1 convolution and average pooling.

    - `halve`: whether there is pooling.
    - `first`: of the network: no ReLU on the image itself.
    """

    def __init__(self, inputs: int, outputs: int, *, halve: bool = True, first: bool = False) -> None:
        super().__init__()
        self.convolution1 = _convolution(inputs, outputs)
        self.convolution2 = _convolution(outputs, outputs)
        self.shortcut = None if inputs == outputs and not halve else _convolution(inputs, outputs, kernel=1)
        self.halve = halve
        self.first = first

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        inner = self.convolution2(relu(self.convolution1(features if self.first else relu(features))))
        if not self.halve:
            return inner + (features if self.shortcut is None else self.shortcut(features))
        assert self.shortcut is not None
        return avg_pool2d(inner, 2) + self.shortcut(avg_pool2d(features, 2))


def _convolution(inputs: int, outputs: int, *, kernel: int = 3) -> nn.Conv2d:
    return spectral(_orthogonal(nn.Conv2d(inputs, outputs, kernel_size=kernel, padding=kernel // 2)))


def _orthogonal(layer: Layer) -> Layer:
    """`layer` with a weight drawn orthogonal and a bias of zero."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    nn.init.orthogonal_(weight)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)
    return layer

"""Small convolutional networks for 8×8 grey images in [−1, 1]."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

CLASSES = 10


@final
class Encoder(nn.Module):
    """Three convolution–BatchNorm–ReLU blocks: images [batch, 1, 8, 8] to features [batch, 16·w].

    - `width`: w, channels of the first block, at 8×8; the next two, of stride 2, have 2w at 4×4 and 4w at 2×2.
    """

    def __init__(self, *, width: int = 16) -> None:
        super().__init__()
        self.features = 16 * width
        self.blocks = nn.Sequential(
            *_block(1, width),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 4 * width, stride=2),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.blocks(images)


@final
class LastTwoLayers(nn.Module):
    """Linear–ReLU–linear, features [batch, features] to logits [batch, 10]: what the needs-aware paper calls A (§4.1).

    Shared with a discriminator it is a projection: D(x, y) = logits(h(x))[y].
    """

    def __init__(self, *, features: int = 256, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return self.layers(features)


@final
class TwoLayers(nn.Module):
    """Linear–tanh–linear, flattened images [batch, 64] to logits [batch, 10]: smooth, so that every method applies to it.

    - `hidden`: units of the first layer.
    """

    def __init__(self, *, hidden: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(64, hidden)
        self.last = nn.Linear(hidden, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.last(self.first(images).tanh())


@final
class Classifier(nn.Module):
    """An `Encoder` and the `LastTwoLayers` as one module: images [batch, 1, 8, 8] to logits [batch, 10]."""

    def __init__(self, *, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.encoder = Encoder(width=width)
        self.last_two_layers = LastTwoLayers(features=self.encoder.features, hidden=hidden)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.last_two_layers(self.encoder(images))


@final
class Generator(nn.Module):
    """Conditional images G(z, y): latents [batch, latent] and labels [batch] to images [batch, 1, 8, 8] in (−1, 1).

    The label's embedding is joined to z; a linear layer makes a 2×2 map, which two blocks of nearest-neighbour
    upsampling, convolution, BatchNorm and ReLU enlarge to 8×8.

    - `latent`: the size of z, standard normal.
    - `width`: channels at 8×8; twice as many at 4×4, four times at 2×2.
    - `embedding`: the size of a label's embedding.
    """

    def __init__(self, *, latent: int = 32, width: int = 16, embedding: int = 16) -> None:
        super().__init__()
        self.latent = latent
        self.embedding = nn.Embedding(CLASSES, embedding)
        self.blocks = nn.Sequential(
            nn.Linear(latent + embedding, 16 * width),
            nn.Unflatten(1, (4 * width, 2, 2)),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            *_block(4 * width, 2 * width),
            nn.Upsample(scale_factor=2),
            *_block(2 * width, width),
            nn.Conv2d(width, 1, kernel_size=3, padding=1),
            nn.Tanh(),
        )

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        return self.blocks(torch.cat((latents, self.embedding(labels)), dim=1))


def _block(inputs: int, outputs: int, *, stride: int = 1) -> tuple[nn.Module, ...]:
    """Convolution, BatchNorm, ReLU; the convolution needs no bias, BatchNorm has one."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

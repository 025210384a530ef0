"""Densely connected networks for small images (Huang et al. 2017)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from problems.blocks.networks._initial import at_least_one, he_initialised


@final
class DenseNet(nn.Module):
    """DenseNet-BC (§3), three dense blocks: images [batch, channels, height, width] to logits [batch, classes].

    Of the depth, four layers are the first convolution, two transitions and the linear layer. With bottlenecks (B) a
    layer of a block is a 1×1 convolution to 4k channels and a 3×3 one to k, so that a block has (depth − 4)/6 of them: 6
    at depth 40, and 16 at depth 100. A transition keeps the share `compression` (C) of the channels and halves the image.
    Parameters with 10 classes and 3 channels, k = 12: BC at depth 40 0.18 million, at depth 100 0.77; at depth 40 without
    bottlenecks and compression 1.0.

    - `depth`: 6n + 4; 3n + 4 without bottlenecks. Raises ValueError for another.
    - `growth`: k, the channels that a layer adds. Raises ValueError below 1.
    """

    def __init__(
        self,
        *,
        depth: int = 40,
        growth: int = 12,
        bottleneck: bool = True,
        compression: float = 0.5,
        classes: int = 10,
        channels: int = 3,
    ) -> None:
        super().__init__()
        each = 6 if bottleneck else 3
        if depth < 4 + each or (depth - 4) % each:
            raise ValueError(f"depth is {depth}; it must be {each}n + 4, with n layers in each of three blocks")
        if not 0 < compression <= 1:
            raise ValueError(f"compression is {compression}; it must be above 0 and at most 1")
        at_least_one(growth=growth)
        width = 2 * growth if bottleneck and compression < 1 else 16
        parts: list[nn.Module] = [nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)]
        for block in range(3):
            if block > 0:
                parts.append(_Transition(width, int(compression * width)))
                width = int(compression * width)
            for _ in range((depth - 4) // each):
                parts.append(_Layer(width, growth, bottleneck=bottleneck))
                width += growth
        self.blocks = nn.Sequential(*parts)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        he_initialised(self)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.head(relu(self.norm(self.blocks(images))).mean(dim=(2, 3)))


@final
class _Layer(nn.Module):
    """[x, H(x)]: H is BatchNorm, ReLU, convolution, once or, with a bottleneck, twice."""

    def __init__(self, inputs: int, growth: int, *, bottleneck: bool) -> None:
        super().__init__()
        narrow = 4 * growth if bottleneck else inputs
        first = (nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, narrow, kernel_size=1, bias=False))
        last = (nn.BatchNorm2d(narrow), nn.ReLU(), nn.Conv2d(narrow, growth, kernel_size=3, padding=1, bias=False))
        self.added = nn.Sequential(*(first if bottleneck else ()), *last)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return torch.cat((features, self.added(features)), dim=1)


@final
class _Transition(nn.Module):
    """BatchNorm, ReLU, 1×1 convolution, 2×2 average pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
        self.layers = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), convolution, nn.AvgPool2d(2))

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return self.layers(features)

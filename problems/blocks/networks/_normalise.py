"""From images in [0, 1] to what a network is trained on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn


@final
class Normalise(nn.Module):
    """(x − mean)/deviation by channel, images [batch, channels, height, width] in [0, 1].

    Both are buffers: they move with the module, are kept in checkpoints and are never trained.

    - `mean`, `deviation`: of each channel of the training images, in units of the largest intensity.

    Raises ValueError if their lengths differ or a deviation is not positive.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, *, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(deviation) or min(deviation, default=1.0) <= 0:
            raise ValueError(f"a mean and a positive deviation for each channel, got {mean} and {deviation}")
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return (images - self.mean) / self.deviation


def normalised(network: nn.Module, *, mean: Sequence[float], deviation: Sequence[float]) -> nn.Module:
    """`network` behind a `Normalise`: it takes images in [0, 1], so that augmentation policies act before it."""
    return nn.Sequential(OrderedDict(normalise=Normalise(mean=mean, deviation=deviation), network=network))

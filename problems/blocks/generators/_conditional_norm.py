"""BatchNorm whose gain and bias depend on a condition."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from problems.blocks.generators._spectral import spectral


@final
class ConditionalBatchNorm(nn.Module):
    """(1 + A c) · (x − mean)/deviation + B c by channel (De Vries et al. 2017; Brock et al. 2019, App. B.1).

    - `channels`: of x, [n, channels, height, width].
    - `condition`: the size of c, [n, condition]: an embedding of the label, with a part of the latent. A and B are
      spectrally normalised and have no bias.
    """

    def __init__(self, channels: int, *, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = (_linear(condition, channels) for _ in range(2))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        gain, bias = (part(condition)[:, :, None, None] for part in (self.gain, self.bias))
        return (1 + gain) * self.norm(features) + bias


def _linear(inputs: int, outputs: int) -> nn.Module:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.orthogonal_(layer.weight)
    return spectral(layer)

"""Spectral normalisation as a function of the weight and of one buffer."""

from __future__ import annotations

from typing import TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

Layer = TypeVar("Layer", bound=nn.Module)


@final
class SpectralNorm(nn.Module):
    """W/σ(W), σ the largest singular value of W flattened to [outputs, everything else] (Miyato et al. 2018, Alg. 1).

    σ ≈ uᵀWv, where v = Wᵀu/‖Wᵀu‖ and u is a buffer, both held constant: the derivative of σ is uvᵀ (their Eq. 11). In
    training mode each use takes one power iteration first, u ← Wv/‖Wv‖. The buffer gets a new tensor and nothing is
    written in place, so that the module is a pure function of its parameters and buffers.

    Error: the estimate lies at or below σ and grows to it as (σ₂/σ₁)^(2k) in k iterations; it starts with 15.
    """

    u: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", normalize(torch.randn(len(matrix), dtype=matrix.dtype), dim=0))
        for _ in range(15):
            self.u = _iterated(matrix, self.u)

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        matrix = weight.flatten(1)
        with torch.no_grad():
            u = _iterated(matrix, self.u) if self.training else self.u
            v = normalize(matrix.T @ u, dim=0)
        if self.training:
            self.u = u
        return weight / (u @ matrix @ v)


def spectral(layer: Layer) -> Layer:
    """`layer`, whose weight is divided by its largest singular value: a convolution, a linear layer or an embedding."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    parametrize.register_parametrization(layer, "weight", SpectralNorm(weight))
    return layer


def _iterated(matrix: Tensor, u: Tensor) -> Tensor:
    return normalize(matrix @ normalize(matrix.T @ u, dim=0), dim=0)

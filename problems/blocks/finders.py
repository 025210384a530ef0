"""Networks from latents to latents."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn


def perceptron(inputs: int, outputs: int, *, layers: int = 3, hidden: int = 64) -> nn.Sequential:
    """`layers` linear layers with leaky ReLU (slope 0.01) between them, [batch, inputs] to [batch, outputs].

    - `layers`: with 1 it is linear.
    - `hidden`: units of every layer but the last.

    Raises ValueError for less than one of either.
    """
    for name, number in (("layers", layers), ("hidden", hidden)):
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    sizes = [inputs, *[hidden] * (layers - 1), outputs]
    parts: list[nn.Module] = []
    for number in range(layers):
        parts += [nn.LeakyReLU()] if number else []
        parts.append(nn.Linear(sizes[number], sizes[number + 1]))
    return nn.Sequential(*parts)


@final
class Residual(nn.Module):
    """z + tanh(network(z)) (Yamaguchi et al. 2023, Eq. 10): latents [batch, latent] that move by less than 1 each."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        return latents + self.network(latents).tanh()

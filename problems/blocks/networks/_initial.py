"""Initial values that the papers' networks share."""

from __future__ import annotations

from torch import nn


def at_least_one(**settings: int) -> None:
    """Raise ValueError for a number of channels, such as `width=0`, that leaves a network without any."""
    for name, number in settings.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


def he_initialised(network: nn.Module) -> None:
    """Set every convolution of `network` to N(0, 2/(k² · outputs)) and every linear bias to zero (He et al. 2015)."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)

"""Objectives called without an engine, and gradients compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Fixed(nn.Module):
    """A module as an objective sees a level."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, training: bool = True, **options: Any) -> Any:
        return self.module(*args, **options)


class Values(dict[str, Any]):
    """Levels as an objective sees them."""

    def once(self, name: str, choose: Any) -> Any:
        with torch.no_grad():
            return choose()

    def shared(self, name: str, compute: Any) -> Any:
        return compute()


def slopes_of(loss: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, named.values(), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def flat(tree: Any) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(tree.items())])


def distance(one: Any, other: Any) -> float:
    """‖one − other‖/‖other‖."""
    assert flat(other).norm() > 1e-8
    return ((flat(one) - flat(other)).norm() / flat(other).norm()).item()

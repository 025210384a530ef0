"""Quadratic levels in any arrangement, whose hypergradients are dense linear algebra."""

from __future__ import annotations

from typing import Any

import torch
from helpers import normal
from torch import Tensor

import mlo

DESCENT = mlo.optimizer.SGD(learning_rate=0.5)
SHAPES = {  # level: what it is given; the upper level u comes last in every path
    "two": {"a": ("u",)},
    "chain": {"a": ("u",), "b": ("a", "u")},
    "diamond": {"a": ("u",), "b": ("u",), "c": ("a", "b")},
}
SIZE = 5


def positive(size: int, condition: float, seed: int) -> Tensor:
    """A symmetric matrix with eigenvalues from 1/condition to 1."""
    vectors, _ = torch.linalg.qr(normal(size, size, seed=seed))
    eigenvalues = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return vectors @ torch.diag(eigenvalues) @ vectors.T


class Quadratics:
    """f = ½wᵀHw − wᵀ(c + Σ Bᵥ v) at every lower level, F = ½ Σ ‖w − t‖²; its hypergradient by dense linear algebra."""

    def __init__(self, shape: str, condition: float, seed: int, decay: float = 0.0) -> None:
        self.given = SHAPES[shape]
        self.h = {name: positive(SIZE, condition, seed + i) for i, name in enumerate(self.given)}
        self.b = {
            (name, read): normal(SIZE, SIZE, seed=seed + 100 + 10 * i + j)
            for i, (name, reads) in enumerate(self.given.items())
            for j, read in enumerate(reads)
        }
        self.c = {name: normal(SIZE, seed=seed + 200 + i) for i, name in enumerate(self.given)}
        self.t = {name: normal(SIZE, seed=seed + 300 + i) for i, name in enumerate(self.given)}
        self.start = {name: normal(SIZE, seed=seed + 400 + i) for i, name in enumerate(self.given)}
        self.u = normal(SIZE, seed=seed + 500)
        self.decay = decay

    def drive(self, name: str, values: Any) -> Tensor:
        return self.c[name] + sum(self.b[name, read] @ values[read] for read in self.given[name])

    def levels(self, method: Any, steps: int, optimizer: Any) -> list[mlo.Level]:
        def lower(name: str) -> mlo.Level:
            def objective(values: Any, batch: Any) -> Tensor:
                w = values[name]
                return 0.5 * w @ self.h[name] @ w - w @ self.drive(name, values)

            return mlo.Level(
                name,
                objective=objective,
                variables=self.start[name],
                given=self.given[name],
                optimizer=optimizer,
                steps=steps,
                hypergradient=method,
            )

        def outer(values: Any, batch: Any) -> Tensor:
            return sum(0.5 * (values[name] - self.t[name]).square().sum() for name in self.given)

        descent = mlo.optimizer.SGD(learning_rate=0.1)
        upper = mlo.Level("u", objective=outer, variables=self.u, subject_to=tuple(self.given), optimizer=descent)
        return [*map(lower, self.given), upper]

    def solution(self) -> tuple[dict[str, Tensor], Tensor]:
        """Where every lower level ends, and the hypergradient there."""
        eye = torch.eye(SIZE, dtype=torch.float64)
        values, in_u = {"u": self.u}, {"u": eye}
        for name in self.given:
            inverse = torch.linalg.inv(self.h[name] + self.decay * eye)
            values[name] = inverse @ self.drive(name, values)
            in_u[name] = inverse @ sum(self.b[name, read] @ in_u[read] for read in self.given[name])
        gradient = sum(in_u[name].T @ (values[name] - self.t[name]) for name in self.given)
        return values, gradient

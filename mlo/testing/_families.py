"""Lower objectives whose gradient, Hessian and cross derivatives are written out: no automatic differentiation.

w is a flat vector, `reads` holds the levels that are read, flat too. Every Hessian has its eigenvalues in
[1/condition, 1], so that a method's settings can be chosen once for all problems.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, final

import torch

from mlo import _random

if TYPE_CHECKING:
    from torch import Tensor

Family: TypeAlias = Literal["quadratic", "ridge", "logistic"]
"""What the lower levels minimise."""


class AbstractTerm(ABC):
    """One lower objective f(w, reads)."""

    @abstractmethod
    def value(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """f, in the type of `w`: what `mlo` differentiates."""

    @abstractmethod
    def gradient(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """∂f/∂w."""

    @abstractmethod
    def hessian(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """∂²f/∂w², n × n."""

    @abstractmethod
    def cross(self, w: Tensor, reads: Mapping[str, Tensor], read: str) -> Tensor:
        """∂²f/∂w∂v for the level v = `read`, n × m."""


@final
@dataclass(frozen=True, eq=False)
class Quadratic(AbstractTerm):
    """f = ½ wᵀHw − wᵀH(c + Σ Bᵥv), whose minimiser is c + Σ Bᵥv."""

    h: Tensor
    c: Tensor
    b: Mapping[str, Tensor]

    def value(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        return w @ self.h.to(w) @ (0.5 * w - self._target(w, reads))

    def gradient(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        return self.h @ (w - self._target(w, reads))

    def hessian(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        return self.h

    def cross(self, w: Tensor, reads: Mapping[str, Tensor], read: str) -> Tensor:
        """See `AbstractTerm`."""
        return -self.h @ self.b[read]

    def _target(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        target = self.c.to(w)
        for name, b in self.b.items():
            target = target + b.to(w) @ reads[name]
        return target


@final
@dataclass(frozen=True, eq=False)
class Penalty:
    """½ Σ dᵢwᵢ² with d = least + (½ − least) σ(Σ Pᵥv), between `least` and ½: the reads choose the penalties."""

    least: float
    p: Mapping[str, Tensor]

    def weights(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """d."""
        return self.least + (0.5 - self.least) * self._logits(w, reads).sigmoid()

    def cross(self, w: Tensor, reads: Mapping[str, Tensor], read: str) -> Tensor:
        """∂²/∂w∂v = diag(w ∂d/∂logits) Pᵥ."""
        chosen = self._logits(w, reads).sigmoid()
        return (w * (0.5 - self.least) * chosen * (1 - chosen))[:, None] * self.p[read]

    def _logits(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        logits = torch.zeros_like(w)
        for name, p in self.p.items():
            logits = logits + p.to(w) @ reads[name]
        return logits


@final
@dataclass(frozen=True, eq=False)
class Ridge(AbstractTerm):
    """f = ‖Xw − y‖²/2N + the penalty."""

    x: Tensor
    y: Tensor
    penalty: Penalty

    def value(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        fit = (self.x.to(w) @ w - self.y.to(w)).square().mean()
        return 0.5 * (fit + (self.penalty.weights(w, reads) * w.square()).sum())

    def gradient(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        return self.x.T @ (self.x @ w - self.y) / len(self.y) + self.penalty.weights(w, reads) * w

    def hessian(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        return self.x.T @ self.x / len(self.y) + self.penalty.weights(w, reads).diag()

    def cross(self, w: Tensor, reads: Mapping[str, Tensor], read: str) -> Tensor:
        """See `AbstractTerm`."""
        return self.penalty.cross(w, reads, read)


@final
@dataclass(frozen=True, eq=False)
class Logistic(AbstractTerm):
    """f = mean log(1 + exp(−yᵢxᵢw)) + the penalty, y = ±1."""

    x: Tensor
    y: Tensor
    penalty: Penalty

    def value(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        margin = self.y.to(w) * (self.x.to(w) @ w)
        loss = torch.nn.functional.softplus(-margin).mean()
        return loss + 0.5 * (self.penalty.weights(w, reads) * w.square()).sum()

    def gradient(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        wrong = (-self.y * (self.x @ w)).sigmoid()
        return -self.x.T @ (self.y * wrong) / len(self.y) + self.penalty.weights(w, reads) * w

    def hessian(self, w: Tensor, reads: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractTerm`."""
        wrong = (-self.y * (self.x @ w)).sigmoid()
        return self.x.T @ ((wrong * (1 - wrong))[:, None] * self.x) / len(self.y) + (
            self.penalty.weights(w, reads).diag()
        )

    def cross(self, w: Tensor, reads: Mapping[str, Tensor], read: str) -> Tensor:
        """See `AbstractTerm`."""
        return self.penalty.cross(w, reads, read)


def normal(*shape: int, key: tuple[object, ...]) -> Tensor:
    """Standard normal numbers in float64, the same for the same key."""
    return torch.randn(shape, generator=_random.generator(*key), dtype=torch.float64)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in float64, holding numbers that `dtype` holds exactly."""
    return tensor.to(dtype).double()


def make(
    family: Family,
    size: int,
    reads: Mapping[str, int],
    *,
    condition: float,
    dtype: torch.dtype,
    key: tuple[object, ...],
    centred: bool,
) -> AbstractTerm:
    """A lower objective of `size` numbers that reads levels of the sizes in `reads`; `centred` leaves out c."""

    def coupling(name: str) -> Tensor:
        return rounded(normal(size, reads[name], key=(*key, name)) * (0.7 / (reads[name] * len(reads)) ** 0.5), dtype)

    couplings = {name: coupling(name) for name in reads}
    if family == "quadratic":
        vectors, _ = torch.linalg.qr(normal(size, size, key=(*key, "vectors")))
        eigenvalues = torch.linspace(1.0, 1.0 / condition, size, dtype=torch.float64)
        h = rounded(vectors @ eigenvalues.diag() @ vectors.T, dtype)
        return Quadratic((h + h.T) / 2, rounded(normal(size, key=(*key, "c")) * (not centred), dtype), couplings)
    samples = 2 * size + 2
    x = normal(samples, size, key=(*key, "x"))
    x = rounded(x * (samples / 2) ** 0.5 / torch.linalg.matrix_norm(x, 2), dtype)  # XᵀX/N ≼ ½
    y = rounded(normal(samples, key=(*key, "y")) * (not centred), dtype)
    penalty = Penalty(min(1.0 / condition, 0.5), couplings)
    return Ridge(x, y, penalty) if family == "ridge" else Logistic(x, y.sign() + (y == 0), penalty)

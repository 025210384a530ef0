"""The Hessian of what a level's optimizer minimises, at the level's response."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import torch

from mlo import _random, _tree
from mlo._audit._krylov import extremes, least_residual
from mlo._audit._report import Reference, Spectrum
from mlo._audit._vectors import flat, shaped, wide

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._linearisation import Linearisation
    from mlo._types import Tree

TOLERANCE = 1e-4
"""Of the ends of a spectrum, relative to the eigenvalue of largest size."""

CONVERGED = 1e-3
"""A relative residual below which the implicit reference is called converged."""

_ASYMMETRIC = 1e4
"""Roundings by which a matrix may differ from its transpose and still be called symmetric."""

SPECTRUM_PRODUCTS = 200
REFERENCE_PRODUCTS = 500


@final
@dataclass(frozen=True, eq=False)
class Curvature:
    """H of a level at its response, as a matrix where it is small, and its spectrum."""

    at: Linearisation
    like: Tree
    spectrum: Spectrum
    dense: tuple[Tensor, Tensor, Tensor] | None  # the matrix, eigenvalues and eigenvectors of its symmetric part

    @classmethod
    def of(cls, at: Linearisation, *, dense: int, seed: int) -> Curvature:
        """Write H out if the level has at most `dense` numbers, and estimate its ends if not."""
        like = at.variables
        size = _tree.size(like)
        first = wide(flat(like))
        if size <= dense:
            eye = torch.eye(size, dtype=flat(like).dtype, device=first.device)
            matrix = torch.stack([wide(flat(at.hessian(shaped(like, row)))) for row in eye])
            if not bool(matrix.isfinite().all()):
                raise ArithmeticError("a Hessian product is not finite")
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            noise = (matrix - matrix.T).norm().item() / 2 + torch.finfo(values.dtype).eps * values.abs().max().item()
            ends = (values[0].item(), values[-1].item(), noise, noise)
            spectrum = _spectrum(*ends, how="dense", products=size, converged=True)
            return cls(at, like, spectrum, (matrix.T, values, vectors))  # its rows were products
        start = torch.randn(size, generator=_random.generator(seed, "audit", "lanczos")).to(first)
        curvature = cls(at, like, _spectrum(0.0, 0.0, 0.0, 0.0, how="", products=0, converged=False), None)
        found = extremes(curvature.product, start, tolerance=TOLERANCE, limit=SPECTRUM_PRODUCTS)
        if not math.isfinite(found.highest):
            raise ArithmeticError("a Hessian product is not finite")
        noise = torch.finfo(flat(like).dtype).eps * max(abs(found.lowest), abs(found.highest))  # of a product
        ends = (found.lowest, found.highest, max(found.lowest_error, noise), max(found.highest_error, noise))
        spectrum = _spectrum(*ends, how="lanczos", products=found.products, converged=found.converged)
        return cls(at, like, spectrum, None)

    def product(self, vector: Tensor) -> Tensor:
        """Hv for a flat vector, in float64 with the precision of the level's own numbers."""
        own = _tree.leaves(self.like)[0].dtype
        return wide(flat(self.at.hessian(shaped(self.like, vector.to(own)))))

    def solve(self, cotangent: Tree) -> tuple[Tree, Reference]:
        """q = H⁺λ: eigenvalues that rounding cannot tell from zero are left out; iteratively where H is not a matrix."""
        q, how, products, residual = self._solved(cotangent)
        gap = torch.dot(q, wide(flat(self.at.gradient))).item()
        found = Reference(how=how, products=products, residual=residual, converged=residual <= CONVERGED, gap=abs(gap))
        return shaped(cotangent, q.to(_tree.leaves(cotangent)[0].dtype)), found

    def _solved(self, cotangent: Tree) -> tuple[Tensor, Literal["dense", "minres"], int, float]:
        right = wide(flat(cotangent))
        precise = _tree.leaves(self.like)[0].element_size() == 8
        if self.dense is not None:
            matrix, values, vectors = self.dense
            eps = torch.finfo(torch.float64 if precise else torch.float32).eps
            if (matrix - matrix.T).norm() > _ASYMMETRIC * eps * matrix.norm():  # of a nest whose inverses are not
                q = torch.linalg.lstsq(matrix, right[:, None], driver="gelsd" if right.is_cpu else None).solution[:, 0]
            else:
                usable = values.abs() > 10 * eps * values.abs().max()
                q = vectors @ torch.where(usable, (vectors.T @ right) / values, torch.zeros_like(values))
            residual = ((matrix @ q - right).norm() / right.norm()).item()
            return q, "dense", len(values), residual
        tolerance = 1e-10 if precise else 1e-5
        solution = least_residual(self.product, right, tolerance=tolerance, limit=REFERENCE_PRODUCTS)
        residual = ((right - self.product(solution.vector)).norm() / right.norm()).item()
        return solution.vector, "minres", solution.products + 1, residual

    def residual(self, q: Tree, cotangent: Tree) -> float:
        """‖λ − Hq‖/‖λ‖."""
        right = wide(flat(cotangent))
        return ((right - self.product(wide(flat(q)))).norm() / right.norm()).item()


def _spectrum(
    low: float, high: float, low_error: float, high_error: float, *, how: str, products: int, converged: bool
) -> Spectrum:
    return Spectrum(
        lambda_min=low,
        lambda_max=high,
        lambda_min_error=low_error,
        lambda_max_error=high_error,
        how=how,
        products=products,
        tolerance=TOLERANCE,
        converged=converged,
    )

"""Invert the Hessian by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractLinearisation
from mlo.hypergradient._implicit import AbstractInverse

if TYPE_CHECKING:
    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(AbstractInverse):
    r"""Solve (H + damping · I) q = λ by conjugate gradients from q = 0 (Hestenes and Stiefel 1952; Rajeswaran et al. 2019).

    For H ≻ 0 with condition κ, after k iterations ‖q − H⁻¹λ‖_H ≤ 2((√κ − 1)/(√κ + 1))ᵏ ‖H⁻¹λ‖_H. Along a direction p with
    pᵀHp ≤ 0 there is no minimum: it stops with the iterate it has, and reports `negative_curvature` 1. Also reports
    `residual`, ‖λ − Hq‖/‖λ‖, and `iterations`. λ = 0 gives q = 0; a product that is not finite gives NaN. Costs one
    Hessian product an iteration.

    - `iterations`: at most so many.
    - `tolerance`: stop at this relative residual; default 1e-12 in float64, 1e-6 in float32.
    - `damping`: δ ≥ 0, in units of curvature.
    """

    iterations: int
    tolerance: float | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be at least 0, got {self.damping}")

    def products(self, size: int) -> int:
        """At most one an iteration."""
        return self.iterations

    @property
    def needs_symmetry(self) -> bool:
        """Yes."""
        return True

    def is_symmetric(self, size: int) -> bool:
        """Only where it can converge: the iterates before depend on the cotangent in a way that is not linear."""
        return self.iterations >= size

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class. Stopping is a mask, so that it works under `vmap`; where it can be looked at, work stops too."""
        solution, residual, direction = _tree.zeros(cotangent), cotangent, cotangent
        square = length = _tree.inner(cotangent, cotangent)
        stop = self._tolerance(cotangent) ** 2 * length
        going = square > stop
        flat = going & ~going
        broken = ~square.isfinite()
        used = going.to(square.dtype) * 0
        for _ in range(self.iterations):
            if at.is_false(going):
                break
            image = _tree.add(at.hessian(direction), direction, scale=self.damping)
            curvature = _tree.inner(direction, image)
            flat = flat | (going & (curvature <= 0))
            broken = broken | (going & ~curvature.isfinite())
            going = going & (curvature > 0)
            step = (square / curvature).where(going, 0.0)
            solution = _tree.add(solution, direction, scale=step)
            residual = _tree.add(residual, image, scale=-step)
            after = _tree.inner(residual, residual)
            turn = (after / square).where(going, 0.0)
            direction = _tree.add(residual, direction, scale=turn)
            used = used + going.to(used.dtype)
            square = after.where(going, square)
            going = going & (square > stop)
        poison = (square * 0).where(
            ~broken, float("nan")
        )  # a comparison with what is not a number is false: say so here
        solution = _tree.apply(lambda tensor: tensor + poison, solution)
        at.report("residual", (square / (length + (length == 0))).sqrt())
        at.report("iterations", used)
        at.report("negative_curvature", flat.to(square.dtype))
        return solution

    def _tolerance(self, cotangent: Tree) -> float:
        if self.tolerance is not None:
            return self.tolerance
        return 1e-12 if _tree.leaves(cotangent)[0].element_size() == 8 else 1e-6

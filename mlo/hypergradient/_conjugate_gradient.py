"""Invert the Hessian by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from math import inf, isfinite, isnan, nan
from typing import TYPE_CHECKING, Literal, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractLinearisation
from mlo.hypergradient._implicit import AbstractInverse
from mlo.hypergradient._iterative import check_chunks, check_settings, default_tolerance, is_wide

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree

_SOLUTION = "solution"


@final
@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(AbstractInverse):
    r"""Solve (H + damping · I) q = λ by conjugate gradients from q = 0 (Hestenes and Stiefel 1952; Rajeswaran et al. 2019).

    For H ≻ 0 with condition κ, after k iterations ‖q − H⁻¹λ‖_H ≤ 2((√κ − 1)/(√κ + 1))ᵏ ‖H⁻¹λ‖_H. Along a direction p with
    pᵀHp ≤ 0 there is no minimum: it stops with the iterate it has, and reports `negative_curvature` 1. Also reports
    `residual`, ‖λ − Hq‖/‖λ‖, `iterations`, and where it took any `lambda_max` and `lambda_min`, the largest and the least
    Rayleigh quotient of its directions, which lie within the spectrum of H + damping · I. λ = 0 gives q = 0; a product that
    is not finite gives NaN. Costs one Hessian product an iteration.

    Warm, it begins at the best point on the line through the solution q₋ that the last iteration of the graph has left in
    `State.memory`, t q₋ with t = λᵀq₋/q₋ᵀHq₋, which is never farther from H⁻¹λ in ‖·‖_H than 0 is; that costs one more
    product. What is solved is the same, to the same tolerance. Stopped before that by `iterations`, q depends on q₋ too,
    and is not linear in λ; nor is that of a cold start, whose directions depend on λ.

    - `iterations`: at most so many.
    - `tolerance`: stop at this relative residual; default 1e-12 in float64, 1e-6 in float32. 0 goes on to 1e-30, or 1e-14.
    - `damping`: δ ≥ 0, in units of curvature.
    - `warm_start`: true or false.
    - `chunks`: in how many parts of the batch products are taken; see `Implicit`.
    - `compare`: `first_order` reports the cosine with what `first_order` pulls back, for one more cross product.
    """

    iterations: int
    tolerance: float | None = None
    damping: float = 0.0
    warm_start: bool = False
    chunks: int = 1
    compare: Literal["first_order"] | None = None

    def __post_init__(self) -> None:
        check_settings(self.iterations, self.tolerance, self.damping)
        check_chunks(self.chunks)

    @property
    def may_stop(self) -> bool:
        """See `AbstractHypergradient`."""
        return True

    def products(self, size: int) -> int:
        """At most one an iteration, and one for a warm start."""
        return self.iterations + self.warm_start

    @property
    def needs_symmetry(self) -> bool:
        """Yes."""
        return True

    def is_symmetric(self, size: int) -> bool:
        """Only where it can converge: the iterates before depend on the cotangent in a way that is not linear."""
        return self.iterations >= size

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class."""
        length = _tree.inner(cotangent, cotangent)
        known = at.known(length)
        return self._solve_unseen(at, cotangent, length) if known is None else self._solve(at, cotangent, length, known)

    def _solve(self, at: AbstractLinearisation, cotangent: Tree, like: Tensor, length: float) -> Tree:
        """Where every number can be looked at: the recurrence as it is printed. `length` is λᵀλ."""
        solution, residual, square = _tree.zeros(cotangent), cotangent, length
        stop = self._tolerance(cotangent) ** 2 * length
        is_flat, used = False, 0
        quotients: list[float] = []  # of Rayleigh
        before = at.recall(_SOLUTION) if self.warm_start else None
        if before is not None:
            image = self._image(at, before)
            curvature, width = _number(before, image), _number(before, before)
            if width > 0:
                quotients.append(curvature / width)
                is_flat = curvature <= 0
            if isfinite(curvature):
                size = _number(cotangent, before) / curvature if curvature > 0 else 0.0
                solution, residual = _tree.scale(before, by=size), _tree.add(cotangent, image, scale=-size)
                square = _number(residual, residual)
            else:
                square = nan
        direction, width = residual, square
        while square > stop and used < self.iterations:
            image = self._image(at, direction)
            curvature = _number(direction, image)
            quotients.append(curvature / width)
            if not 0 < curvature < inf:
                is_flat, square = is_flat or curvature <= 0, square if isfinite(curvature) else nan
                break
            step = square / curvature
            solution = _tree.add(solution, direction, scale=step)
            residual = _tree.add(residual, image, scale=-step)
            after = _number(residual, residual)
            turn = after / square
            direction = _tree.add(residual, direction, scale=turn)
            width = after + turn * turn * width  # ‖direction‖², for the residual is orthogonal to the one before
            square = after
            used += 1
        if not isfinite(square):  # a comparison with what is not a number is false: say so here
            solution = _tree.apply(lambda tensor: tensor + nan, solution)
        reports = {
            "residual": (square / length) ** 0.5 if length else (0.0 if isfinite(square) else nan),
            "iterations": float(used),
            "negative_curvature": float(is_flat),
        }
        if quotients:
            reports |= {"lambda_max": _extreme(max, quotients), "lambda_min": _extreme(min, quotients)}
        for name, number in reports.items():
            at.report(name, like.new_tensor(number))
        if self.warm_start:
            at.remember(_SOLUTION, solution)
        return solution

    def _solve_unseen(self, at: AbstractLinearisation, cotangent: Tree, length: Tensor) -> Tree:
        """Stopping is a mask, so that it works under `vmap`; where a flag can be looked at, work stops too."""
        solution, residual, square = _tree.zeros(cotangent), cotangent, length
        stop = self._tolerance(cotangent) ** 2 * length
        flat = going = square < 0  # false
        broken = ~square.isfinite()
        quotients: list[tuple[Tensor, Tensor]] = []  # of Rayleigh, and where they were taken
        before = at.recall(_SOLUTION) if self.warm_start else None
        if before is not None:
            image = self._image(at, before)
            curvature = _tree.inner(before, image)
            width = _tree.inner(before, before)
            flat = (curvature <= 0) & (width > 0)
            quotients.append((curvature / width, width > 0))
            broken = broken | ~curvature.isfinite()
            size = (_tree.inner(cotangent, before) / curvature).where(curvature > 0, 0.0)
            solution, residual = _tree.scale(before, by=size), _tree.add(cotangent, image, scale=-size)
            square = _tree.inner(residual, residual)
        direction, width = residual, square
        going = square > stop
        used = going.to(square.dtype) * 0
        for _ in range(self.iterations):
            if at.is_false(going):
                break
            image = self._image(at, direction)
            curvature = _tree.inner(direction, image)
            quotients.append((curvature / width, going))
            step = square / curvature
            flat = flat | (going & (curvature <= 0))
            broken = broken | (going & ~curvature.isfinite())
            going = going & (curvature > 0)
            step = step.where(going, 0.0)
            solution = _tree.add(solution, direction, scale=step)
            residual = _tree.add(residual, image, scale=-step)
            after = _tree.inner(residual, residual)
            turn = (after / square).where(going, 0.0)
            direction = _tree.add(residual, direction, scale=turn)
            width = after + turn * turn * width
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
        if quotients:
            taken = [quotient.where(where, float("nan")) for quotient, where in quotients]
            for name, found in (("lambda_max", reduce(_largest, taken)), ("lambda_min", reduce(_least, taken))):
                at.report(name, found.where(~found.isnan(), 0.0))
        if self.warm_start:
            at.remember(_SOLUTION, solution)
        return solution

    def _image(self, at: AbstractLinearisation, direction: Tree) -> Tree:
        image = at.hessian(direction)
        return _tree.add(image, direction, scale=self.damping) if self.damping else image

    def _tolerance(self, cotangent: Tree) -> float:
        if self.tolerance is None:
            return default_tolerance(cotangent)
        # squares far below would underflow, and look like a lack of curvature
        return max(self.tolerance, 1e-30 if is_wide(cotangent) else 1e-14)


def _number(tree: Tree, other: Tree) -> float:
    return _tree.inner(tree, other).item()


def _extreme(of: Callable[[Iterable[float]], float], numbers: Iterable[float]) -> float:
    """The largest or least of those that are numbers; 0 if none is."""
    kept = [number for number in numbers if not isnan(number)]
    return of(kept) if kept else 0.0


def _largest(one: Tensor, other: Tensor) -> Tensor:
    """Of those that are numbers."""
    return one.fmax(other)


def _least(one: Tensor, other: Tensor) -> Tensor:
    """Of those that are numbers."""
    return one.fmin(other)

"""Invert a matrix that need not be symmetric, by minimal residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractLinearisation
from mlo.hypergradient._implicit import AbstractInverse
from mlo.hypergradient._iterative import check_chunks, check_settings, default_tolerance, is_wide

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree


@final
@dataclass(frozen=True, kw_only=True)
class GMRES(AbstractInverse):
    r"""Solve (H + damping · I) q = λ by generalised minimal residuals from q = 0 (Saad and Schultz 1986, Alg. 4).

    After k iterations q is the one in the span of λ, Hλ, …, H^{k−1}λ with the smallest ‖λ − Hq‖. Any matrix that is not
    singular will do: an indefinite Hessian, and the Jacobian of a game or of a nest, which is not symmetric. At most n
    iterations for n numbers, up to rounding; few where the eigenvalues lie in a few clusters away from 0. Reports
    `residual`, ‖λ − Hq‖/‖λ‖, and `iterations`. λ = 0 gives q = 0. Costs one product and one vector of memory an iteration;
    for a symmetric positive matrix `ConjugateGradient` needs no such memory.

    - `iterations`: at most so many.
    - `tolerance`: stop at this relative residual; default 1e-12 in float64, 1e-6 in float32.
    - `damping`: δ ≥ 0, in units of curvature.
    - `chunks`: in how many parts of the batch products are taken; see `Implicit`.
    - `compare`: `first_order` reports the cosine with what `first_order` pulls back, for one more cross product.

    Raises ValueError for settings outside these ranges.
    """

    iterations: int
    tolerance: float | None = None
    damping: float = 0.0
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
        """At most one an iteration, and no more than there are numbers."""
        return min(self.iterations, size)

    def is_symmetric(self, size: int) -> bool:
        """Only where it can converge."""
        return self.iterations >= size

    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """See the class: Arnoldi's basis by modified Gram–Schmidt, the small triangle by Givens rotations."""
        length = _tree.norm(cotangent)
        stop = (default_tolerance(cotangent) if self.tolerance is None else self.tolerance) * length
        rounding = 1e-14 if is_wide(cotangent) else 1e-6
        basis = [_tree.scale(cotangent, by=_inverse(length))]
        columns, rotations, right = list[list["Tensor"]](), list[tuple["Tensor", "Tensor"]](), [length]
        used = length * 0
        residual = length
        for _ in range(self.products(_tree.size(cotangent))):
            going = residual.abs() > stop
            if at.is_false(going):
                break
            used = used + going.to(used.dtype)
            image = _tree.add(at.hessian(basis[-1]), basis[-1], scale=self.damping)
            column, size = list["Tensor"](), _tree.norm(image)
            for vector in basis:
                column.append(_tree.inner(image, vector))
                image = _tree.add(image, vector, scale=-column[-1])
            below = _tree.norm(image)
            below = below.where(below > rounding * size, 0.0)  # else what is left of it is rounding, and no direction
            basis.append(_tree.scale(image, by=_inverse(below)))
            for index, (cosine, sine) in enumerate(rotations):
                upper, lower = column[index], column[index + 1]
                column[index], column[index + 1] = cosine * upper + sine * lower, cosine * lower - sine * upper
            hypotenuse = (column[-1].square() + below.square()).sqrt()
            cosine, sine = column[-1] * _inverse(hypotenuse), below * _inverse(hypotenuse)
            rotations.append((cosine, sine))
            columns.append([*column[:-1], hypotenuse])
            right[-1:] = [cosine * residual, -sine * residual]
            residual = right[-1]
        solution = _tree.scale(cotangent, by=residual * 0)  # not a number where that is none
        for vector, weight in zip(basis, _back_substituted(columns, right), strict=False):
            solution = _tree.add(solution, vector, scale=weight)
        at.report("residual", residual.abs() * _inverse(length))
        at.report("iterations", used)
        return solution


def _inverse(number: Tensor) -> Tensor:
    """1/number, 0 for 0: where a basis cannot grow there is nothing to add."""
    zero = (number == 0).to(number.dtype)
    return (1 - zero) / (number + zero)


def _back_substituted(columns: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """x of the triangle R x = right, with R by columns; 0 where the diagonal is."""
    found: list[Tensor] = []
    for row in reversed(range(len(columns))):
        rest = right[row]
        for index, value in enumerate(reversed(found), row + 1):
            rest = rest - columns[index][row] * value
        found.append(rest * _inverse(columns[row][row]))
    return found[::-1]

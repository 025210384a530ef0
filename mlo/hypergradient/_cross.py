"""Cross products (∂²f/∂w∂u)ᵀ q, exact or by central differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractCross, AbstractLinearisation, AbstractStep, Cost

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream


@final
@dataclass(frozen=True, kw_only=True)
class ExactCross(AbstractCross):
    """(∂²f/∂w∂u)ᵀ q by a second reverse pass. One product."""

    @property
    def cost(self) -> Cost:
        """One product."""
        return Cost(gradients=0, products=1)

    @property
    def compares(self) -> bool:
        """No."""
        return False

    def product(self, at: AbstractLinearisation, direction: Tree) -> Upstream:
        """See the class."""
        return at.cross(direction)


@final
@dataclass(frozen=True, kw_only=True)
class CentralDifference(AbstractCross):
    """(∇ᵤf(w + εq, u) − ∇ᵤf(w − εq, u)) / 2ε with ε = radius/‖q‖. Two gradients, error O(radius²) on smooth objectives."""

    radius: float = 0.01

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius must be positive, got {self.radius}")

    @property
    def cost(self) -> Cost:
        """Two gradients."""
        return Cost(gradients=2, products=0)

    @property
    def compares(self) -> bool:
        """Yes."""
        return True

    def product(self, at: AbstractLinearisation, direction: Tree) -> Upstream:
        """See the class."""
        return central_difference(at, at.variables, direction, self.radius)


def central_difference(
    at: AbstractLinearisation | AbstractStep,
    start: Tree,
    direction: Tree,
    radius: float,
    *,
    length: float | None = None,
    scale: float | Tensor = 1.0,
) -> Upstream:
    """scale · (∂²f/∂w∂u)ᵀ q at `start` for q = `direction`, from two gradients in u; zero for q = 0.

    ε is not differentiated. Where it is a number, each side is one pass over the variables, and two where it is a tensor.
    `length` is `moderate_length`, for those who have asked already.
    """
    if length is None:
        norm = _length(direction)
        # Any ε will do where q = 0: both sides are then the same.
        epsilon = radius / (_moderate(at.known(norm)) or norm + (norm == 0))
    else:
        epsilon = radius / length
    places = (_tree.add(start, direction, scale=sign * epsilon) for sign in (1, -1))
    return {name: _tree.scale(tree, by=0.5 * scale / epsilon) for name, tree in at.difference_of_reads(places).items()}


def moderate_length(at: AbstractLinearisation | AbstractStep, direction: Tree) -> float | None:
    """‖q‖, where it can be looked at and neither over- nor underflows."""
    return _moderate(at.known(_length(direction)))


def _length(direction: Tree) -> Tensor:
    """‖q‖ in one pass and to 1e-4, which is as good as any ε; more exactly for types that have no such product."""
    tensors = _tree.leaves(direction)
    kinds = {tensor.dtype for tensor in tensors}
    if any(kind.itemsize < 4 or not kind.is_floating_point for kind in kinds):
        return _tree.norm(direction).detach()
    flat = [tensor.reshape(-1) for tensor in tensors]
    squares = [each.dot(each) for each in flat]
    return sum(squares[1:], squares[0]).sqrt().detach()


def _moderate(length: float | None) -> float | None:
    return length if length is not None and 1e-30 < length < 1e30 else None

"""Cross products (∂²f/∂w∂u)ᵀ q, exact or by central differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractCross, AbstractLinearisation, Cost

if TYPE_CHECKING:
    from collections.abc import Callable

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
        return central_difference(at.difference_of_reads, at.variables, direction, self.radius)


def central_difference(
    difference_of_reads: Callable[[Tree, Tree], Upstream], start: Tree, direction: Tree, radius: float
) -> Upstream:
    """(∂²f/∂w∂u)ᵀ q at `start` for q = `direction`, from two gradients in u; zero for q = 0. ε is not differentiated."""
    length = _tree.norm(_tree.detach(direction))
    epsilon = radius / (length + (length == 0))  # any ε will do where q = 0: both sides are then the same
    places = (_tree.add(start, direction, scale=sign * epsilon) for sign in (1, -1))
    return {name: _tree.scale(tree, by=0.5 / epsilon) for name, tree in difference_of_reads(*places).items()}

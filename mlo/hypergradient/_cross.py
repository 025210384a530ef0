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
    scale: float | Tensor = 1.0,
) -> Upstream:
    """scale · (∂²f/∂w∂u)ᵀ q at `start` for q = `direction`, from two gradients in u; zero for q = 0.

    ε is not differentiated. Where it is a number, each side is one pass over the variables, and two where it is a tensor.
    """
    length = _tree.norm(_tree.detach(direction))
    known = at.known(length)
    # Any ε will do where q = 0: both sides are then the same.
    epsilon = radius / (length + (length == 0)) if known is None else radius / (known or 1.0)
    places = (_tree.add(start, direction, scale=sign * epsilon) for sign in (1, -1))
    return {name: _tree.scale(tree, by=0.5 * scale / epsilon) for name, tree in at.difference_of_reads(*places).items()}

"""Compare responses, and differentiate nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo.hypergradient._abstract import AbstractHypergradient, AbstractResponse, Cost, Nesting, Tape

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream
    from mlo.optimizer import AbstractOptimizer


@final
@dataclass(frozen=True, kw_only=True)
class ZerothOrder(AbstractHypergradient):
    r"""Central differences of the response itself: for objectives that cannot be differentiated in what they read.

    The steps are taken again from the same start, with the same batches and noise, where the m numbers of the levels read
    are moved along orthonormal directions e₁, …, e_n:

        ū = m/n Σᵢ ⟨λ, w*(u + r eᵢ) − w*(u − r eᵢ)⟩ / 2r · eᵢ

    With all m directions (the default: one number at a time) this is (dw*/du)ᵀ λ to O(radius²) where the steps are smooth
    in u; with fewer, random ones (the orthonormal form of evolution strategies: Choromanski et al. 2018, Eq. 8) it is that
    in the mean, with a relative variance of about m/n − 1. Discrete choices are made anew from the same uniforms: a step
    function of u has the slope of its average over 2·radius. Costs 2n times the gradients of the steps, no derivative in
    u and no second derivative; memory does not grow.

    - `samples`: n, how many directions; by default, and at most, m.
    - `radius`: r, how far the numbers are moved together, in their units.

    Raises ValueError for settings outside these ranges.
    """

    samples: int | None = None
    radius: float = 0.01

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if not self.radius > 0:
            raise ValueError(f"radius must be positive, got {self.radius}")

    @property
    def differentiates(self) -> bool:
        """No."""
        return False

    @property
    def follows_optimizer(self) -> bool:
        """Yes."""
        return True

    def tape(self, steps: int, size: int) -> Tape:
        """Nothing."""
        return Tape(recorded=0, kept=1)

    def cost(self, steps: int, size: int) -> Cost:
        """See `cost_of_reads`."""
        return Cost(gradients=0, products=0)

    def cost_of_reads(self, steps: int, numbers: int) -> Cost:
        """What the steps cost, for each direction and side."""
        directions = numbers if self.samples is None else min(self.samples, numbers)
        return Cost(gradients=2 * directions * steps, products=0)

    def nesting(self, steps: int, size: int) -> Nesting:
        """Differences of responses have no history."""
        return Nesting(refused="responses that are only compared cannot be differentiated again")

    def objection(self, optimizer: AbstractOptimizer) -> str | None:
        """None: no derivative of the optimizer is needed."""
        return None

    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """See the class. With no steps the response depends on nothing."""
        if not response.steps:
            return {}
        total: dict[str, Tree] = {}
        directions = response.directions(self.samples)
        for direction in directions:
            above, below = (response.retaken(direction, scale=sign * self.radius) for sign in (1.0, -1.0))
            slope = _tree.inner(cotangent, _tree.subtract(above, below)) / (2 * self.radius)
            for name, tree in direction.items():
                part = _tree.scale(tree, by=slope)
                total[name] = _tree.add(total[name], part) if name in total else part
        numbers = sum(_tree.size(tree) for tree in total.values())
        return {name: _tree.scale(tree, by=numbers / len(directions)) for name, tree in total.items()}

"""Differentiate the response as a solution: the implicit function theorem, composed of an inverse and a cross product."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, final

from mlo import _tree
from mlo.hypergradient._abstract import (
    AbstractCross,
    AbstractHypergradient,
    AbstractLinearisation,
    AbstractResponse,
    Cost,
    Nesting,
    Tape,
)
from mlo.hypergradient._cross import ExactCross
from mlo.optimizer import is_decoupled

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream
    from mlo.optimizer import AbstractOptimizer


class AbstractInverse(AbstractHypergradient):
    """An approximate inverse of the Hessian H of what a level's optimizer minimises, f with its L2 decay.

    By itself it is a hypergradient method: `Implicit` with the exact cross product. `solve` needs not be differentiable, and
    may be called with any cotangent: what it remembers and reports is all that it leaves.
    """

    chunks: int = 1
    """In how many chunks of the batch products are taken."""

    compare: Literal["first_order"] | None = None
    """Another method whose pullback is compared with this one's."""

    needs_step: ClassVar[bool] = False
    """Whether it uses the step that led to the response, and without one contributes nothing."""

    @abstractmethod
    def solve(self, at: AbstractLinearisation, cotangent: Tree) -> Tree:
        """q ≈ H⁻¹ λ."""

    @abstractmethod
    def products(self, size: int) -> int:
        """Hessian products of one solve for `size` numbers; an upper bound where there is a tolerance."""

    @property
    def needs_symmetry(self) -> bool:
        """Whether it is wrong for a matrix that is not symmetric."""
        return False

    def is_symmetric(self, size: int) -> bool:
        """Whether the approximate inverse of a symmetric matrix is a symmetric matrix itself."""
        return True

    @property
    def divides_into(self) -> int:
        """See `AbstractHypergradient`."""
        return self.chunks

    def nesting(self, steps: int, size: int) -> Nesting:
        """See `Implicit`."""
        return Implicit(inverse=self).nesting(steps, size)

    def tape(self, steps: int, size: int) -> Tape:
        """See `Implicit`."""
        return Implicit(inverse=self).tape(steps, size)

    def cost(self, steps: int, size: int) -> Cost:
        """See `Implicit`."""
        return Implicit(inverse=self).cost(steps, size)

    def objection(self, optimizer: AbstractOptimizer) -> str | None:
        """See `Implicit`."""
        return Implicit(inverse=self).objection(optimizer)

    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """See `Implicit`."""
        return Implicit(inverse=self).pullback(response, cotangent)


@final
@dataclass(frozen=True, kw_only=True)
class Implicit(AbstractHypergradient):
    r"""Pull back through ∂f/∂w(w*(u), u) = 0, at the response, on the batch and noise of its last step.

        ū = −(∂²f/∂w∂u)ᵀ q,    q ≈ (∂²f/∂w²)⁻¹ λ        (Lorraine et al. 2020, Eq. 2)

    f includes the optimizer's L2 weight decay. Exact at a solution with an exact inverse; away from one it differentiates
    a response that has not been reached. Costs one gradient, the products of the inverse and those of the cross product.
    An optimizer whose decay is decoupled (AdamW) does not minimise f, and is refused.

    Where the inverse has `chunks`, the batch is divided into as many, f = Σ (n_c/n) f_c, and products are summed over them,
    as are the gradients of a central difference. The graph of a chunk is built for each product, used and freed: one
    gradient more a product, and memory for one chunk and a few copies of the variables. Exact for objectives that are means
    over samples; with batch statistics each chunk has its own, and noise drawn inside the objective is drawn for each. It
    reports `chunk_difference`, ‖Σ (n_c/n) ∇f_c − ∇f‖ / Σ (n_c/n) ‖∇f_c‖: rounding where the sum is exact. Refused for
    objectives that declare that they are no such mean, in a nest, and in compiled steps.

    With `compare` it reports `first_order_cosine`, that of the angle to the cross product with λ itself, over all levels
    that are read; 0 where one of the two is zero. Costs one more cross product.

    - `inverse`: `Neumann`, `ConjugateGradient`, `GMRES`, `Nystrom`, `Exact`, `Preconditioned` or `FirstOrder`.
    - `cross`: `ExactCross` or `CentralDifference`.
    """

    inverse: AbstractInverse
    cross: AbstractCross = field(default_factory=ExactCross)

    @property
    def may_stop(self) -> bool:
        """See `AbstractHypergradient`."""
        return self.inverse.may_stop

    @property
    def divides_into(self) -> int:
        """See `AbstractHypergradient`."""
        return self.inverse.chunks

    def tape(self, steps: int, size: int) -> Tape:
        """The last step, unrecorded: the response is taken as a solution, however it was reached."""
        return Tape(recorded=0, kept=1)

    def cost(self, steps: int, size: int) -> Cost:
        """One gradient to linearise, then products."""
        if self.inverse.needs_step and not steps:
            return Cost(gradients=0, products=0)
        crossings = 1 if self.inverse.compare is None else 2
        products = self.inverse.products(size) + crossings * self.cross.cost.products
        rebuilt = products if self.divides_into > 1 else 0
        return Cost(gradients=1 + crossings * self.cross.cost.gradients + rebuilt, products=products)

    def nesting(self, steps: int, size: int) -> Nesting:
        """The derivative of the inverse is the same inverse and one product, that of the response this once more."""
        own = self.cost(steps, size)
        return Nesting(
            refused=None if self.divides_into == 1 else "products over chunks are not differentiated again",
            compares=self.cross.compares,
            plain=self.cross.cost.gradients * (1 if self.inverse.compare is None else 2),
            symmetric=self.inverse.is_symmetric(size),
            needs_symmetry=self.inverse.needs_symmetry,
            again=Cost(own.gradients + 2, own.products + self.inverse.products(size) + 2),
        )

    def objection(self, optimizer: AbstractOptimizer) -> str | None:
        """A decoupled decay moves the variables without being part of what is minimised."""
        if not is_decoupled(optimizer):
            return None
        kind = type(optimizer).__name__
        return f"{kind}'s decoupled weight decay is no part of an objective whose optimum could be differentiated"

    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """See the class."""
        if self.inverse.needs_step and not response.steps:
            return {}
        at = response.linearise(chunks=self.divides_into)
        found = self.cross.product(at, at.inverse(self.inverse.solve, cotangent))
        if self.inverse.compare is not None:
            at.report("first_order_cosine", _cosine(found, self.cross.product(at, cotangent)))
        return {name: _tree.scale(tree, by=-1.0) for name, tree in found.items()}


def _cosine(one: Upstream, other: Upstream) -> Tensor:
    """⟨one, other⟩/(‖one‖ ‖other‖) over all trees together; each is first made of length 1, so that nothing underflows."""
    first, second = (_normalised([leaf for name in one for leaf in _tree.leaves(each[name])]) for each in (one, other))
    return _tree.inner(first, second).clamp(-1, 1)


def _normalised(tensors: list[Tensor]) -> Tree:
    tree = {str(place): tensor for place, tensor in enumerate(tensors)}
    length = _tree.norm(tree)
    return _tree.scale(tree, by=1 / (length + (length == 0)))

"""What a hypergradient method is given, and what it must provide. No file of this package imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlo import _tree

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream
    from mlo.optimizer import AbstractOptimizer


class Cost(NamedTuple):
    """Reverse passes of one pullback: `gradients` of first order, `products` of second (Hessian or cross)."""

    gradients: int
    products: int


class Tape(NamedTuple):
    """What a level keeps of the steps it takes, counted from the last one back.

    - `recorded`: steps whose graph is kept while they are taken, to be differentiated in one sweep.
    - `kept`: steps of which only start and draws are kept, to be evaluated again; of the last one its gradient too.
    - `every`: of the starts of these only one in so many is kept, and the others are found by taking the steps again: one
      more gradient for each of them, memory for kept/every + every starts. Not together with `recorded`.
    - `forward`: whether a tangent for every number that is read is carried along.
    - `compared`: whether gradients beside the start of the last step will be asked for: what the objective shares among its
      evaluations is then computed with that step.
    """

    recorded: int
    kept: int
    every: int = 1
    forward: bool = False
    compared: bool = False


class Nesting(NamedTuple):
    """What matters about a pullback where it, or the response it belongs to, is differentiated again.

    Where a level in the middle of a nest is differentiated through its total gradient, the pullbacks below it are
    differentiated themselves: through all that they are made of, an inverse by the same inverse.

    - `refused`: why this pullback cannot be differentiated, or None.
    - `follows`: whether it is the derivative of the steps as they were taken, all of them.
    - `compares`: whether it evaluates the gradient where the level's own variables are moved.
    - `symmetric`: whether it is symmetric in the Hessian, so that the Jacobian of the total gradient is too.
    - `needs_symmetry`: whether it is wrong where the Jacobian of the gradient it inverts is not symmetric.
    - `needs_objective`: why it cannot pull back a level that follows a total gradient, or None.
    - `plain`: how many of its gradients are not linearised.
    - `recording`: what it costs more where it is recorded.
    - `again`: what one derivative of it costs, of itself and of the response.
    """

    refused: str | None = None
    follows: bool = False
    compares: bool = False
    symmetric: bool = True
    needs_symmetry: bool = False
    needs_objective: str | None = None
    plain: int = 0
    recording: Cost = Cost(0, 0)
    again: Cost = Cost(0, 0)


class AbstractHypergradient(ABC):
    """The pullback of a response, seen as a primitive of reverse-mode differentiation.

    A response w*(u) is what a level's optimizer makes of its variables, given the levels u it reads.
    """

    @abstractmethod
    def tape(self, steps: int, size: int) -> Tape:
        """What must be kept of `steps` optimizer steps of a level with `size` numbers."""

    @abstractmethod
    def cost(self, steps: int, size: int) -> Cost:
        """What one pullback costs beyond the steps themselves; an upper bound where there is a tolerance."""

    def cost_of_reads(self, steps: int, numbers: int) -> Cost:
        """What it costs besides, for so many numbers in the levels that are read: nothing but for special methods."""
        return Cost(0, 0)

    @abstractmethod
    def objection(self, optimizer: AbstractOptimizer) -> str | None:
        """Why a response of `optimizer` cannot be pulled back like this, or None."""

    @property
    def follows_optimizer(self) -> bool:
        """Whether it differentiates the steps themselves, and so the options of the optimizer that are read from a level.

        False unless a method says otherwise: it is then refused where such an option would have to be differentiated.
        True is right for what is made of `pull_recorded` or `replay` alone.
        """
        return False

    @property
    def differentiates(self) -> bool:
        """Whether it asks for derivatives of the level's objective in what it reads."""
        return True

    @property
    def may_stop(self) -> bool:
        """Whether it may cost less than `cost` says, because it stops at a tolerance or remembers."""
        return False

    @property
    def is_joint(self) -> bool:
        """Whether levels that play against each other are pulled back together."""
        return False

    @property
    def divides_into(self) -> int:
        """In how many chunks of the batch it takes its products; 1 for the batch as a whole."""
        return 1

    def nesting(self, steps: int, size: int) -> Nesting:
        """What matters where this pullback, of `steps` steps of a level with `size` numbers, is part of a nest."""
        return Nesting()

    @abstractmethod
    def pullback(self, response: AbstractResponse, cotangent: Tree) -> Upstream:
        """From the cotangent λ on w* to (∂w*/∂u)ᵀ λ for every level u that is asked for and that w* depends on."""


class AbstractResponse(ABC):
    """The steps a level took in one iteration, as the engine recorded them.

    Every evaluation it offers uses the batch, the noise and the discrete choices of the step it belongs to, and changes
    nothing: no weight, buffer or RNG state.
    """

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many optimizer steps were taken; with 0 the state itself is the response."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many numbers the level holds."""

    @property
    @abstractmethod
    def recorded(self) -> int:
        """How many steps at the end can be pulled back through by `pull_recorded`: as many as were asked for, see `Tape`."""

    @abstractmethod
    def pull_recorded(self, cotangent: Tree) -> Upstream:
        """(∂w*/∂u)ᵀ λ through the recorded steps; whatever came before them is held fixed. One product a step.

        Under several processes steps are kept where a method asks for recorded ones: then one gradient a step, too.
        """

    @abstractmethod
    def taken(self) -> Sequence[AbstractStep]:
        """The steps that were kept, in the order in which they were taken; the last one always is, if there is one."""

    @abstractmethod
    def contract(self, cotangent: Tree) -> Upstream:
        """(∂w*/∂u)ᵀ λ from the tangents that were carried along (`Tape.forward`). No pass at all."""

    @abstractmethod
    def directions(self, count: int | None) -> Sequence[Upstream]:
        """Orthonormal directions in all numbers that are read together: random ones, or one number at a time.

        `count` is how many; None, or as many as there are numbers, stands for one number at a time.
        """

    @abstractmethod
    def retaken(self, direction: Upstream, *, scale: float) -> Tree:
        """Where the same steps lead, with the same draws, where the levels read are moved by scale · direction.

        Choices made from values are made anew. One gradient a step.
        """

    @abstractmethod
    def linearise(self, *, chunks: int = 1) -> AbstractLinearisation:
        """The gradient of what the optimizer minimises, linearised at the response. One gradient.

        With `chunks` its products are summed over so many parts of the batch, and cost one gradient more each: none of the
        graph is kept. For objectives that are means over samples.
        """


class AbstractStep(ABC):
    """One optimizer step (w', s') = (w, s) − …(g(w, u)) with the optimizer's moments s, linearised where it started."""

    @property
    @abstractmethod
    def start(self) -> Tree:
        """w, the variables at the start of the step."""

    @abstractmethod
    def pull_update(self, cotangent: Tree) -> Tree:
        """(∂w'/∂g)ᵀ λ, by the optimizer's own update at the gradient g it was given."""

    @property
    def multiple(self) -> float | Tensor | None:
        """κ where `pull_update` gives κλ for every λ, as it does for SGD, whose update is linear; None elsewhere."""
        return None

    @abstractmethod
    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """∂f/∂u with the level's own variables at `variables`. One gradient."""

    def difference_of_reads(self, places: Iterable[Tree]) -> Upstream:
        """`gradient_of_reads` at the first of two places less that at the second, each asked for when its turn comes.

        Two gradients.
        """
        return _tree.difference(*map(self.gradient_of_reads, places))

    def known(self, value: Tensor) -> float | None:
        """See `AbstractLinearisation`."""
        return None

    @abstractmethod
    def replay(self, cotangent: Tree, moments: Upstream) -> tuple[Tree, Upstream, Upstream]:
        """From cotangents on w' and on the moments s' to those on w, on s, and on u. One gradient and one product.

        A moment that is absent has no cotangent.
        """


class AbstractLinearisation(ABC):
    """f at a response, with the L2 decay that its optimizer adds, linearised once; every use has the same draws."""

    @property
    @abstractmethod
    def variables(self) -> Tree:
        """w*, where it is linearised."""

    @abstractmethod
    def hessian(self, direction: Tree) -> Tree:
        """(∂²f/∂w²) v. One product."""

    @abstractmethod
    def cross(self, direction: Tree) -> Upstream:
        """(∂²f/∂w∂u)ᵀ v for the levels u that are asked for and that ∂f/∂w depends on. One product."""

    @abstractmethod
    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """∂f/∂u with the level's own variables at `variables`. One gradient."""

    def difference_of_reads(self, places: Iterable[Tree]) -> Upstream:
        """`gradient_of_reads` at the first of two places less that at the second, each asked for when its turn comes.

        Two gradients.
        """
        return _tree.difference(*map(self.gradient_of_reads, places))

    @abstractmethod
    def inverse(self, solve: Callable[[AbstractLinearisation, Tree], Tree], cotangent: Tree) -> Tree:
        """q = `solve`(this, λ). Below a nested level it is differentiated again: by the same inverse, not through it."""

    @abstractmethod
    def dense_solve(self, cotangent: Tree, *, damping: float) -> Tree:
        """(∂²f/∂w² + damping · I)⁻¹ λ with the whole matrix; not a number where it is singular. n products."""

    @abstractmethod
    def nystrom_solve(self, cotangent: Tree, *, rank: int, damping: float) -> Tree:
        """(H̃ + damping · I)⁻¹ λ for the Nyström approximation H̃ of ∂²f/∂w² from `rank` random directions.

        With Ω an orthonormal basis of the span of `normal(0)`, …, `normal(rank − 1)`: H̃ = HΩ (ΩᵀHΩ)⁺ ΩᵀH. Reports
        `lambda_max`, the largest eigenvalue of H̃, and `negative_curvature`. min(rank, n) products.
        """

    @abstractmethod
    def pull_update(self, cotangent: Tree) -> Tree:
        """(∂w'/∂g)ᵀ λ of the last step the optimizer took, moments and all. There must have been one."""

    @abstractmethod
    def normal(self, index: int) -> Tree:
        """Standard normal numbers shaped like the level's variables: the same for the same iteration, seed and index.

        No generator but their own is touched, and every tensor's numbers depend on its name and not on its place.
        """

    @abstractmethod
    def recall(self, name: str) -> Tree | None:
        """What the last iteration that pulled this level back for this upper level remembered as `name`.

        None where there is nothing, where it is not shaped like the level's variables, and inside a transform.
        """

    @abstractmethod
    def remember(self, name: str, tree: Tree) -> None:
        """Keep `tree`, shaped like the level's variables, in `State.memory`; the last one of an iteration stays.

        Nothing is kept by `Graph.hypergradient`, which has no state to give back, nor inside a transform.
        """

    @abstractmethod
    def is_false(self, flag: Tensor) -> bool:
        """Whether `flag` is known to be false. Looking costs a synchronisation, so it is not always looked at."""

    def known(self, value: Tensor) -> float | None:
        """The number in a zero-dimensional tensor, where looking needs no waiting: on the CPU, outside transforms.

        None elsewhere. Where numbers are known, a flag that `is_false` did not find false is true.
        """
        return None

    @abstractmethod
    def report(self, name: str, value: Tensor) -> None:
        """Say how the pullback went: a zero-dimensional tensor for `Metrics.reports`."""


class AbstractCross(ABC):
    """How a cross product is computed."""

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """Of one cross product."""

    @property
    @abstractmethod
    def compares(self) -> bool:
        """Whether it evaluates the gradient where the level's own variables are moved."""

    @abstractmethod
    def product(self, at: AbstractLinearisation, direction: Tree) -> Upstream:
        """(∂²f/∂w∂u)ᵀ v."""

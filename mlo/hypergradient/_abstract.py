"""What a hypergradient method is given, and what it must provide. No file of this package imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlo._types import Tree, Upstream


class Cost(NamedTuple):
    """Reverse passes of one pullback: `gradients` of first order, `products` of second (Hessian or cross)."""

    gradients: int
    products: int


class AbstractHypergradient(ABC):
    """The pullback of a response, seen as a primitive of reverse-mode differentiation.

    A response w*(u) is what a level's optimizer makes of its variables, given the levels u it reads.
    """

    @abstractmethod
    def recorded(self, steps: int) -> int:
        """Of `steps` optimizer steps, how many at the end must be recorded for differentiation while they are taken."""

    @abstractmethod
    def cost(self, steps: int) -> Cost:
        """What one pullback over `steps` steps costs beyond the steps themselves."""

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

    @abstractmethod
    def pull_recorded(self, cotangent: Tree) -> Upstream:
        """(∂w*/∂u)ᵀ λ through the recorded steps; whatever came before them is held fixed. One product a step."""

    @abstractmethod
    def last(self) -> AbstractStep:
        """The last step; there is none where `steps` is 0."""


class AbstractStep(ABC):
    """The last optimizer step w' = w − …(g), linearised where it started."""

    @property
    @abstractmethod
    def start(self) -> Tree:
        """w, the variables at the start of the step."""

    @abstractmethod
    def pull_update(self, cotangent: Tree) -> Tree:
        """(∂w'/∂g)ᵀ λ, by the optimizer's own update at the gradient g it was given."""

    @abstractmethod
    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """∂f/∂u with the level's own variables at `variables`. One gradient."""

"""One example of a property: a method, what it promises, a problem; and how two answers are compared."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch

from mlo._errors import NumericalError
from mlo._graph import Graph
from mlo.optimizer import SGD, AbstractOptimizer, Adam, RMSprop
from mlo.testing._closed_form import UPPER, ClosedForm
from mlo.testing._layout import UNUSED, flat

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._state import State
    from mlo._types import Objective, Tree
    from mlo.hypergradient import AbstractHypergradient
    from mlo.testing._promise import Promise

FLOOR = 0.01
"""Errors are relative to the expected size plus this much: a hypergradient that happens to vanish proves little."""


class Violation(AssertionError):
    """A property that does not hold: what is wrong, what was expected, what was found, on what if not on the problem."""

    def __init__(self, wrong: str, expected: object = None, found: object = None, on: str | None = None) -> None:
        super().__init__(wrong)
        self.wrong, self.expected, self.found, self.on = wrong, expected, found, on


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One example. `steps` is at least 1; `optimizer` is the kind of the lower ones where a property does not choose."""

    method: AbstractHypergradient
    promise: Promise
    tolerance: float
    float32_tolerance: float
    problem: ClosedForm
    steps: int
    optimizer: str

    @property
    def allowed(self) -> float:
        """The relative error allowed in the problem's type."""
        return self.tolerance if self.problem.dtype == torch.float64 else self.float32_tolerance

    def on(self, problem: ClosedForm) -> Case:
        """The same with another problem."""
        return replace(self, problem=problem)

    def rule(self) -> AbstractOptimizer:
        """The lower optimizer, with the decay of the problem."""
        decay = self.problem.decay
        chosen: dict[str, AbstractOptimizer] = {
            "sgd": self.problem.descent,
            "momentum": SGD(learning_rate=0.2, momentum=0.6, weight_decay=decay),
            "adam": Adam(learning_rate=0.05, weight_decay=decay),
            "rmsprop": RMSprop(learning_rate=0.05, weight_decay=decay),
        }
        rule = chosen[self.optimizer]
        return self.problem.descent if self.method.objection(rule) else rule

    def graph(self, *, rule: AbstractOptimizer | None = None, objective: Objective | None = None) -> Graph:
        """The problem's graph with this method everywhere."""
        return Graph(
            self.problem.levels(self.method, steps=self.steps, optimizer=rule or self.rule(), objective=objective)
        )

    def pulled(self, graph: Graph, cotangents: Mapping[str, Tensor], state: State | None = None) -> Tensor:
        """What arrives at u, in a `graph` of `linear`, for `cotangents` on the lower levels."""
        batches = {UPPER: {name: vector.to(self.problem.dtype) for name, vector in cotangents.items()}}
        return self.vector(graph.parts(UPPER, state or graph.init(), batches).indirect)

    def linear(self, values: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """F = Σ ⟨λ, w⟩, whose cotangents on the lower levels are the batch."""
        total = 0 * flat(values[UPPER]).sum()
        for name, cotangent in batch.items():
            total = total + flat(values[name]) @ cotangent
        return total

    def vector(self, tree: Tree) -> Tensor:
        """A tree shaped like u as a flat vector of float64. Violated if it is not shaped like u."""
        right = self.problem.tree(UPPER, self.problem.start[UPPER])
        expected, found = _shapes(right), _shapes(tree)
        if expected != found:
            raise Violation("the hypergradient is not shaped like the upper level's variables", expected, found)
        if isinstance(tree, Mapping) and UNUSED in tree and bool((tree[UNUSED] != 0).any()):
            raise Violation("a tensor that no objective reads has a hypergradient", 0, tree[UNUSED])
        return flat(tree).double()

    def compare(
        self,
        what: str,
        found: Tensor,
        expected: Tensor,
        allowed: float,
        *,
        size: float | None = None,
        on: str | None = None,
    ) -> None:
        """Violated unless ‖found − expected‖ ≤ allowed · (‖expected‖ + FLOOR), or relative to `size`."""
        error = (found - expected).norm().item() / ((expected.norm().item() if size is None else size) + FLOOR)
        if not error <= allowed:
            raise Violation(f"{what} by {error:.1e}, relatively ({allowed:.0e} is allowed)", expected, found, on)


def _shapes(tree: Tree) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    tensors = tree if isinstance(tree, Mapping) else {"": tree}
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def counted(steps: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{steps} step{'s' * (steps != 1)}"


def same_bits(one: Any, two: Any) -> bool:
    """Whether two nests of mappings hold the same tensors, not-a-numbers included."""
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one)
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(_bits(one), _bits(two))


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(torch.int64 if tensor.element_size() == 8 else torch.int32)


def copied(one: Any) -> Any:
    """A nest of mappings with its tensors cloned."""
    return {key: copied(value) for key, value in one.items()} if isinstance(one, Mapping) else one.detach().clone()


def contents(state: State) -> dict[str, Any]:
    """All tensors of a state."""
    moments = {name: dict(memory.moments) for name, memory in state.optimizers.items()}
    return {
        "values": dict(state.values),
        "buffers": dict(state.buffers),
        "moments": moments,
        "memory": {" ".join(pair): dict(trees) for pair, trees in state.memory.items()},
    }


@contextmanager
def stopped() -> Generator[list[NumericalError]]:
    """Collects the `NumericalError` that stops what is inside."""
    found: list[NumericalError] = []
    try:
        yield found
    except NumericalError as error:
        found.append(error)

"""What goes into an iteration and what comes out of it, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch

from mlo import _tree
from mlo._errors import UserError
from mlo._modes import is_traced

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree
    from mlo.optimizer import OptimizerState


Memory: TypeAlias = "Mapping[tuple[str, str], Mapping[str, Tree]]"
"""By the pair (upper, level) and by name, trees shaped like the variables of the level."""

HYPERGRADIENT = "hypergradient"
"""What is remembered under (upper, upper)."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class State:
    """Everything that changes from one iteration to the next, by the name of the level.

    - `values`: the variables, and nothing else.
    - `buffers`: for levels that hold a module, its buffers and its frozen parameters.
    - `optimizers`: what each optimizer remembers; levels without one are absent.
    - `iteration`: how many iterations are finished.
    - `seed`: what all noise inside objectives is keyed by.
    - `memory`: by the pair (upper, level), what the level's method remembers of its last pullback, by name; under
      (upper, upper), the last hypergradient. Empty at the beginning, and safe to drop: nothing is wrong without it.
    """

    values: Mapping[str, Any]
    buffers: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, OptimizerState]
    iteration: int = 0
    seed: int = 0
    memory: Memory = field(default_factory=dict)


@final
@dataclass(frozen=True, eq=False)
class Batches:
    """One batch for each step of a level: `mlo.Batches([first, second])`."""

    batches: Sequence[Any]

    def __getitem__(self, step: int) -> Any:
        return self.batches[step]


def batch_of(batches: Mapping[str, Any], level: str, step: int) -> Any:
    """The batch of `level` at its `step`, counted from 0; None for a level that was given none.

    Raises `UserError` if its `Batches` are too few.
    """
    given = batches.get(level)
    if not isinstance(given, Batches):
        return given
    if step >= len(given.batches):
        raise UserError(f"level '{level}' needs a batch for step {step + 1} and was given {len(given.batches)}")
    return given[step]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """A hypergradient by the way it takes; each part is shaped like the variables of the upper level.

    - `direct`: the partial gradient of the objective in the upper level's own variables.
    - `through`: what arrives over the response of each level as the last arrow, (∂w*/∂u)ᵀ λ with the whole cotangent λ on
      that response.
    - `has_direct`: false where the objective does not read the upper level's own variables: `partial` is None, and `direct`
      zero.
    - `like`: the variables of the upper level.
    """

    partial: Tree | None
    through: Mapping[str, Tree]
    like: Tree

    @property
    def has_direct(self) -> bool:
        """See the class."""
        return self.partial is not None

    @cached_property
    def direct(self) -> Tree:
        """See the class."""
        return _tree.zeros(self.like) if self.partial is None else self.partial

    @property
    def indirect(self) -> Tree:
        """The sum of all parts but the direct one."""
        return next(iter(self.through.values())) if len(self.through) == 1 else self._indirect

    @cached_property
    def _indirect(self) -> Tree:
        return _tree.total(self.through.values()) if self.through else _tree.zeros(self.direct)

    @property
    def total(self) -> Tree:
        """The hypergradient."""
        return self.indirect if self.partial is None else self._total

    @cached_property
    def _total(self) -> Tree:
        return _tree.total([self.direct, *self.through.values()])


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Norms:
    """Euclidean norms of the `Parts` of a hypergradient, zero-dimensional tensors.

    `cosine` is that of the angle to the hypergradient of the upper level's step before, in this iteration or an earlier
    one: near 1 it goes on in one direction, near 0 it is noise, near −1 it turns about. 0 where one of the two is zero;
    None at the first step.
    """

    total: Tensor
    direct: Tensor
    indirect: Tensor
    through: Mapping[str, Tensor]
    cosine: Tensor | None = None

    @classmethod
    def of(cls, parts: Parts, before: Tree | None = None) -> Norms:
        """The norms of `parts`, and the cosine to the hypergradient `before`."""
        through = {name: _norm(part) for name, part in parts.through.items()}
        indirect = next(iter(through.values())) if len(through) == 1 else _norm(parts.indirect)
        total = indirect if parts.partial is None else _norm(parts.total)
        return cls(
            total=total,
            direct=indirect.new_zeros(()) if parts.partial is None else _norm(parts.partial),
            indirect=indirect,
            through=through,
            cosine=None if before is None else _cosine(parts.total, total, before),
        )


FEW = 4096
"""Numbers up to which copying them next to each other costs less than an operation more."""


def _norm(tree: Tree) -> Tensor:
    """`_tree.norm`, in one piece where the numbers are few. A compiler does better with the pieces."""
    tensors = _tree.leaves(tree)
    if len(tensors) == 1 or is_traced():
        return _tree.norm(tree)
    kinds = {(tensor.dtype, tensor.layout, tensor.device) for tensor in tensors}
    if len(kinds) > 1 or tensors[0].layout is not torch.strided or _tree.size(tree) > FEW:
        return _tree.norm(tree)
    numbers = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return numbers.dot(numbers).sqrt()


def _cosine(tree: Tree, length: Tensor, other: Tree) -> Tensor:
    """⟨tree, other⟩/(‖tree‖ ‖other‖), each divided by its own length first, so that no product under- or overflows."""
    lengths = [length, _tree.norm(other)]
    one, two = (
        _tree.scale(each, by=1 / (size + (size == 0))) for each, size in zip((tree, other), lengths, strict=True)
    )
    return _tree.inner(one, two).clamp(-1, 1)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Metrics:
    """What one iteration showed.

    - `losses`: each level's objective at its last step, before that step; levels that did not move are absent.
    - `norms`: the hypergradient's, for every upper level that moved, at its last step.
    - `measured`: what objectives measured beside their loss, the mean over the level's steps.
    - `pullbacks`: pairs (upper, level), in the order they were made.
    - `gradients`, `products`: reverse passes of first and of second order.
    - `reports`: by the pair (upper, level), what the level's method says of how its last pullback went: residuals.
    """

    losses: Mapping[str, Tensor]
    norms: Mapping[str, Norms]
    measured: Mapping[str, Mapping[str, Tensor]]
    pullbacks: tuple[tuple[str, str], ...]
    gradients: int
    products: int
    reports: Mapping[tuple[str, str], Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass
class Tally:
    """Counts what an iteration costs while it runs, and gathers what its methods say.

    `recalled` is what earlier iterations remembered, `remembered` what this one does.
    `cotangents` are, by the pair (upper, level), the λ that arrived on the level's response in its last pullback.
    """

    gradients: int = 0
    products: int = 0
    pullbacks: list[tuple[str, str]] = field(default_factory=list)
    cotangents: dict[tuple[str, str], Tree] = field(default_factory=dict)
    reports: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)
    recalled: Memory = field(default_factory=dict)
    remembered: dict[tuple[str, str], dict[str, Tree]] = field(default_factory=dict)

    def memory(self) -> Memory:
        """What the next iteration recalls: what is new, and what is old where nothing is."""
        return {
            **self.recalled,
            **{pair: {**self.recalled.get(pair, {}), **trees} for pair, trees in self.remembered.items()},
        }

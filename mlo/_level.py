"""A level: one optimization problem inside another, as a frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, final, get_args

from mlo._errors import UserError
from mlo._structure import ARROWS, reads
from mlo._types import Constraint
from mlo.hypergradient import AbstractHypergradient, Unroll
from mlo.optimizer import AbstractOptimizer, has_closed_pullback, options_read

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlo._types import Objective


@final
@dataclass(frozen=True, eq=False)
class Level:
    """One level of a graph: variables, the objective they minimise, what it reads, and how it is solved.

    - `name`: how other levels list it.
    - `objective`: `objective(values, batch)` giving a scalar loss, or a loss and a mapping of measurements. `values` holds
      the level itself and what it lists; a level without an optimizer needs none.
    - `variables`: a mapping of tensors, one tensor, or an `nn.Module`. Parameters with `requires_grad=False` count as
      buffers. What is given here is cloned, never changed.
    - `given`: levels the objective, or the optimizer for its options, reads and holds fixed.
    - `subject_to`: levels whose responses it differentiates through; it reads them too.
    - `against`: the other players of a simultaneous game. Both read the values at the start of the iteration.
    - `constraints`: by a pattern of names (`*` for a single tensor), `softplus`, `sigmoid` or `softmax` (along the last
      dimension); the first pattern that matches wins. Objectives see `variables` as they are given here, and these stay
      where the constraint says; the optimizer moves their preimages, which are what a state holds and what a
      hypergradient is in.
    - `optimizer`: None makes the level a constant.
    - `steps`: optimizer steps an iteration. With 0 the state counts as the solution.
    - `every`, `warm_up`: the level is due at iteration t = warm_up + every, warm_up + 2·every, …, counted from 1.
    - `lookahead`: on an upper level: once it has moved, the levels it is subject to step back and retake their steps.
    - `hypergradient`: how cotangents on this level's response are pulled back.
    - `nested`: of a level that is subject to others and that others are subject to: `reduced` differentiates the total
      gradient it follows, `direct` only the partial one, with the responses below and what came through them held fixed.

    Levels are compared by identity. Raises `UserError` where a field cannot mean anything.
    """

    name: str
    variables: Mapping[str, Tensor] | Tensor | nn.Module = field(kw_only=True)
    objective: Objective | None = field(default=None, kw_only=True)
    given: tuple[str, ...] = field(default=(), kw_only=True)
    subject_to: tuple[str, ...] = field(default=(), kw_only=True)
    against: tuple[str, ...] = field(default=(), kw_only=True)
    constraints: Mapping[str, Constraint] = field(default_factory=dict[str, Constraint], kw_only=True)
    optimizer: AbstractOptimizer | None = field(default=None, kw_only=True)
    steps: int = field(default=1, kw_only=True)
    every: int = field(default=1, kw_only=True)
    warm_up: int = field(default=0, kw_only=True)
    lookahead: bool = field(default=False, kw_only=True)
    hypergradient: AbstractHypergradient = field(default=Unroll(), kw_only=True)
    nested: Literal["reduced", "direct"] = field(default="reduced", kw_only=True)

    def __post_init__(self) -> None:
        for arrow in ARROWS:
            names: Any = getattr(self, arrow)
            if isinstance(names, str):
                raise UserError(
                    f"level '{self.name}', {arrow}: expected a tuple of names, got '{names}'; write ('{names}',)"
                )
            object.__setattr__(self, arrow, tuple(names))
        for pattern, constraint in self.constraints.items():
            if constraint not in get_args(Constraint):
                expected = f"expected {', '.join(get_args(Constraint))}, got {constraint!r}"
                raise UserError(f"level '{self.name}', constraints, '{pattern}': {expected}")
        if self.optimizer is not None and not isinstance(self.optimizer, AbstractOptimizer):
            raise UserError(f"level '{self.name}', optimizer: expected one of mlo.optimizer, got {self.optimizer!r}")
        if not isinstance(self.hypergradient, AbstractHypergradient):
            raise UserError(
                f"level '{self.name}', hypergradient: expected one of mlo.hypergradient, got {self.hypergradient!r}"
            )
        if self.optimizer is not None and self.objective is None:
            raise UserError(f"level '{self.name}' has an optimizer and no objective")

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """All levels that the objective may read, itself first."""
        return reads(self)

    @cached_property
    def read_by_optimizer(self) -> frozenset[str]:
        """The levels that options of the optimizer are read from."""
        return frozenset(read.level for _, read in options_read(self.optimizer)) if self.optimizer else frozenset()

    @cached_property
    def has_closed_pullback(self) -> bool:
        """Whether the pullback of an update has a closed form: see `mlo.optimizer.has_closed_pullback`."""
        return self.optimizer is not None and has_closed_pullback(self.optimizer)

    @property
    def is_joint(self) -> bool:
        """Whether it is differentiated together with the levels it plays against."""
        return self.hypergradient.is_joint

    @property
    def frozen(self) -> bool:
        """Whether the level is a constant."""
        return self.optimizer is None

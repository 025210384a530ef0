"""What every optimizer provides. No file of this package imports torch: tensors bring their own arithmetic."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast, final

from mlo.optimizer._read import Option, Read
from mlo.schedule._abstract import AbstractSchedule, bounds_of

if TYPE_CHECKING:
    from mlo._types import Tree
    from mlo.optimizer._arithmetic import Setting

Groups: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Options that differ for some parameters, by a pattern of their names."""

SHARED = ("clip_norm", "clip_value", "groups")
"""Options of every optimizer that `update` knows nothing of: `mlo/optimizer/_apply.py` sees to them."""


@final
@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What an optimizer remembers: how many updates it has made, and its moments by name.

    A moment is shaped like the variables; a parameter whose group remembers nothing is absent from it.
    """

    count: int = 0
    moments: Mapping[str, Tree] = field(default_factory=dict[str, "Tree"])


class AbstractOptimizer(ABC):
    """A pair of pure functions; its fields are its settings.

    `update` is differentiable in the gradient, the moments and the parameters: an unrolled response is its composition,
    and `FiniteDifference` pulls a cotangent through its last application. Every optimizer has these options beside its own:

    - `clip_norm`: the gradient is scaled down to this Euclidean norm over all variables of the level where it is longer.
    - `clip_value`: every entry of the gradient is cut to at most this size, before its norm is.
    - `groups`: other options for parameters whose name matches a pattern, `{"*.bias": {"weight_decay": 0}}`; the first
      pattern that matches wins.

    Any option that is a number may be a schedule, or a `Read`: then it is read from a level, and a step is differentiable in
    it. `update` is of an optimizer without any, as `mlo.optimizer.updated` makes it for an iteration: where an option was
    read it holds the tensor, zero-dimensional or shaped like the parameter. Where options differ between parameters, each
    is updated by itself.
    """

    clip_norm: Option | None
    clip_value: Option | None
    groups: Groups | None

    @abstractmethod
    def init(self, parameters: Tree) -> OptimizerState:
        """The state before the first update: moments are zero."""

    @abstractmethod
    def update(self, gradient: Tree, state: OptimizerState, parameters: Tree) -> tuple[Tree, OptimizerState]:
        """New parameters and new state; the arguments are left as they are. Neither clips nor looks at groups."""

    @property
    @abstractmethod
    def l2_decay(self) -> Option | None:
        """The d for which it minimises f + d/2 ‖w‖²; None for a decay that is decoupled, and belongs to no objective.

        Groups may have others: see `mlo.optimizer.l2_decays`.
        """


def check_shared(optimizer: AbstractOptimizer) -> None:
    """Raise ValueError where one of the options that all optimizers have is wrong."""
    for name in ("clip_norm", "clip_value"):
        value: Option | None = getattr(optimizer, name)
        if value is not None:
            positive(name, value)
    options = [each.name for each in dataclasses.fields(cast("Any", optimizer)) if each.name not in SHARED]
    for pattern, changes in (optimizer.groups or {}).items():
        for name in changes:
            if name not in options:
                known = ", ".join(options)
                raise ValueError(f"groups, '{pattern}': a group has no option '{name}'; known: {known}")
        try:
            member(optimizer, pattern)
        except ValueError as error:
            raise ValueError(f"groups, '{pattern}': {error}") from None


def member(optimizer: AbstractOptimizer, pattern: str) -> AbstractOptimizer:
    """The optimizer of the parameters that `pattern` wins: itself for '', which stands for all others."""
    changes = (optimizer.groups or {}).get(pattern, {})
    changed: Any = dataclasses.replace(cast("Any", optimizer), clip_norm=None, clip_value=None, groups=None, **changes)
    return changed


def plain(option: Option) -> Setting:
    """An option of an optimizer that was made for an iteration: none of them is a schedule any more, or to be read."""
    if not isinstance(option, (float, int)) and isinstance(option, AbstractSchedule | Read):
        raise TypeError(
            "an optimizer with schedules, or with options that are read, takes steps through mlo.optimizer.updated, which "
            "knows the iteration and the levels"
        )
    return option


def positive(name: str, value: Option) -> None:
    """Raise ValueError unless `value` > 0. A schedule may reach 0, as an annealed learning rate does at its end.

    What is read from a level is the business of that level's constraints, here and below.
    """
    if isinstance(value, Read):
        return
    least, greatest = bounds_of(value)
    if not (greatest > 0 and (least > 0 or (least == 0 and isinstance(value, AbstractSchedule)))):
        raise ValueError(f"{name} must be positive, got {value}")


def at_least_zero(name: str, value: Option) -> None:
    """Raise ValueError unless `value` ≥ 0."""
    if not isinstance(value, Read) and not bounds_of(value)[0] >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def fraction(name: str, value: Option) -> None:
    """Raise ValueError unless 0 ≤ `value` < 1."""
    if isinstance(value, Read):
        return
    least, greatest = bounds_of(value)
    if not (least >= 0 and greatest < 1):
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")

"""Functions of a problem by the names that a graph gives them, with their options bound."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from mlo._errors import UserError
from mlo._problem import Problem
from mlo.schedule._abstract import AbstractSchedule
from mlo.spec._durations import Durations
from mlo.spec._faults import Fault, first_name, unknown
from mlo.spec._levels import LevelSpec
from mlo.spec._nodes import fold
from mlo.spec._options import check_options

if TYPE_CHECKING:
    from mlo._objective import Values


def objective_of(problem: Problem, level: LevelSpec, durations: Durations, faults: list[Fault]) -> Any:
    """The level's objective with its options bound, those that are schedules taken anew at each iteration."""
    found = bound(problem.objectives, level, "objective", faults, schedule=AbstractSchedule)
    if found is None:
        return None
    options = durations.resolve(found.options, level, "objective")
    schedules = {name: option for name, option in options.items() if isinstance(option, AbstractSchedule)}
    return _Scheduled(found.function, options, schedules) if schedules else found


def bound(
    table: Mapping[str, Callable[..., Any]],
    level: LevelSpec,
    key: str,
    faults: list[Fault],
    schedule: type[AbstractSchedule] | None = None,
) -> Bound | None:
    """The function that the level's choice names, with its options bound, or None after adding to `faults`."""
    choice = getattr(level, key)
    here = ("levels", level.name, key)
    found = {fold(name): function for name, function in table.items()}.get(fold(choice.name))
    if found is None:
        faults.append(Fault(here, unknown(key.removesuffix("s") if key == "variables" else key, choice.name, table)))
        return None
    options, wrong = check_options(found, choice.options, schedule=schedule)
    faults += [fault.below((*here, choice.name)) for fault in wrong]
    return None if wrong else Bound(found, options)


def refused(error: ValueError | UserError, variables: Bound, level: LevelSpec) -> Fault:
    """What a builder of variables says, at the option that its first word names."""
    first = first_name(error)
    choice = level.variables
    inside = (choice.name, first) if choice is not None and first in variables.options else ()
    return Fault(("levels", level.name, "variables", *inside), f"{error}{'' if str(error).endswith('.') else '.'}")


@final
@dataclass(frozen=True)
class Bound:
    """A function with its options, printed as the graph writes it."""

    function: Callable[..., Any]
    options: Mapping[str, Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, **self.options)


@final
@dataclass(frozen=True)
class _Scheduled:
    """An objective some of whose options change from iteration to iteration."""

    function: Callable[..., Any]
    options: Mapping[str, Any]
    schedules: Mapping[str, AbstractSchedule]

    def __call__(self, values: Values, batch: Any) -> Any:
        now = {name: schedule(values.iteration) for name, schedule in self.schedules.items()}
        return self.function(values, batch, **{**self.options, **now})


def under_autocast(objective: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`objective` with matrix products and convolutions in bfloat16; what it returns is float32 again."""

    @functools.wraps(objective)  # with its options
    def evaluated(*arguments: Any, **options: Any) -> Any:
        # Without the cache: a copy made where no derivative is taken, as `values.once` does, would cut later ones off.
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            answer = objective(*arguments, **options)
        loss, *measured = answer if isinstance(answer, tuple) else (answer,)
        loss = loss.float() if isinstance(loss, torch.Tensor) else loss
        return (loss, *measured) if measured else loss

    return evaluated

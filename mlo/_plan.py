"""A graph as the engine needs it, and what is the same at every iteration of it: worked out once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, final

from mlo._structure import depends_on, is_due, nested, reads, response_order, surroundings

if TYPE_CHECKING:
    from mlo._level import Level
    from mlo._module import Skeleton


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """A graph as the engine needs it: levels by name in run order, and the code of their modules."""

    levels: Mapping[str, Level]
    skeletons: Mapping[str, Skeleton]

    @cached_property
    def moving(self) -> Mapping[str, Level]:
        """The levels that are no constants."""
        return {name: level for name, level in self.levels.items() if not level.frozen}

    @cached_property
    def nested(self) -> frozenset[str]:
        """The levels in the middle: see `mlo._structure.nested`."""
        return nested(self.levels)

    def differentiated(self, upper: str) -> tuple[str, ...]:
        """The levels whose responses `upper` differentiates through, each after all that its response depends on."""
        return self._differentiated[upper]

    def depends_on(self, name: str) -> tuple[str, ...]:
        """The levels that the response of level `name` depends on."""
        return self._depends_on[name]

    def surroundings(self, name: str) -> tuple[str, ...]:
        """The levels whose values a response of level `name` is computed from, itself first."""
        return self._surroundings[name]

    def agenda(self, iteration: int) -> Agenda:
        """What happens at `iteration`, which counts from 1."""
        if iteration > self._settled:
            return self._whole
        due = tuple([name for name, level in self.moving.items() if is_due(level, iteration)])
        found = self._agendas.get(due)
        if found is None:
            found = self._agendas[due] = Agenda.of(self, due)
        return found

    @cached_property
    def _settled(self) -> float:
        """The iteration after which all levels are due at every one, if there is one."""
        rare = any(level.every > 1 for level in self.moving.values())
        return inf if rare else max((level.warm_up for level in self.moving.values()), default=0)

    @cached_property
    def _whole(self) -> Agenda:
        return Agenda.of(self, tuple(self.moving))

    @cached_property
    def _agendas(self) -> dict[tuple[str, ...], Agenda]:
        return {}

    @cached_property
    def _differentiated(self) -> dict[str, tuple[str, ...]]:
        return {name: response_order(level, self.levels) for name, level in self.levels.items()}

    @cached_property
    def _depends_on(self) -> dict[str, tuple[str, ...]]:
        return {name: depends_on(level, self.levels) for name, level in self.levels.items()}

    @cached_property
    def _surroundings(self) -> dict[str, tuple[str, ...]]:
        return {
            name: surroundings(level, self.levels) if name in self.nested else reads(level)
            for name, level in self.levels.items()
        }


@final
@dataclass(frozen=True, eq=False)
class Agenda:
    """What happens in an iteration, by which levels are due.

    - `due`: in run order.
    - `uppers`: those that differentiate through others and are in the middle of no nest.
    - `live`: these and what they differentiate through; `pulled`: the latter alone.
    - `inner`: below one in the middle, so that their responses are taken anew, before anybody needs those they have now.
    - `ahead`: the uppers that look ahead.
    """

    due: tuple[str, ...]
    uppers: frozenset[str]
    live: frozenset[str]
    pulled: frozenset[str]
    inner: frozenset[str]
    ahead: tuple[str, ...]

    @classmethod
    def of(cls, plan: Plan, due: tuple[str, ...]) -> Agenda:
        """The agenda of iterations in which the levels `due` are."""
        uppers = [name for name in due if plan.differentiated(name) and name not in plan.nested]
        inner = {lower for name in due if name in plan.nested for lower in plan.differentiated(name)}
        for place, name in enumerate(due):  # uppers that come first need the responses they have now
            if name in uppers and any(later in plan.nested for later in due[place:]):
                inner -= set(plan.differentiated(name))
        pulled = frozenset(name for upper in uppers for name in plan.differentiated(upper))
        ahead = tuple(name for name in uppers if plan.levels[name].lookahead)
        return cls(due, frozenset(uppers), pulled | set(uppers), pulled, frozenset(inner), ahead)

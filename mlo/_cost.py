"""What iterations cost in reverse passes, known before the first one is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

from torch import nn

from mlo import _structure
from mlo._reduction import current_group
from mlo.hypergradient import Cost as Passes

if TYPE_CHECKING:
    from mlo._level import Level
    from mlo._plan import Plan


@final
class Cost(NamedTuple):
    """What a number of iterations costs: reverse passes of first and second order, and pullbacks."""

    gradients: int
    products: int
    pullbacks: int


def predicted(plan: Plan, iterations: int) -> Cost:
    """What the first `iterations` cost; exact for methods of fixed length, and for nests of three levels."""
    total, pullbacks = Passes(0, 0), 0
    retaken: dict[str, set[int]] = {name: set() for name in plan.levels}  # when, for however many levels ahead
    inside = _Prediction(plan)
    for name, level in plan.levels.items():
        times = _structure.times_due(level, iterations)
        if name in plan.nested or not plan.differentiated(name):
            total = _sum(total, _times(times, inside.responses([name])))
            pullbacks += times * inside.sweeps(name)
            continue
        below = plan.differentiated(name)
        live = {name, *below}
        pulled = [inside.pullback(lower, live) for lower in below]
        total = _sum(total, _times(times * level.steps, _sum(Passes(1, 0), *pulled)))
        total = _sum(total, _times(times * max(0, level.steps - 1), inside.responses(below)))
        total = _sum(total, _times(times * level.steps, *(inside.recording(lower) for lower in below)))
        again = sum(inside.sweeps(lower) for lower in below)
        pullbacks += times * (level.steps * len(below) + max(0, level.steps - 1) * again)
        if level.lookahead:
            for lower in below:
                retaken[lower].update(range(level.warm_up + level.every, iterations + 1, level.every))
    for name, times in retaken.items():
        above = (middle for middle in plan.nested if name in plan.differentiated(middle))
        alone = times.difference(*(retaken[middle] for middle in above))  # else taken with the one in the middle
        total = _sum(total, _times(len(alone), inside.responses([name])))
        pullbacks += len(alone) * inside.sweeps(name)
    total = _sum(total, _carried(plan, iterations))
    return Cost(*total, pullbacks)


def _carried(plan: Plan, iterations: int) -> Passes:
    """What tangents cost that are carried along with steps: once a response, for all levels that are due together."""
    carrying = {
        name: level
        for name, level in plan.levels.items()
        if level.hypergradient.tape(level.steps, size(level.variables)).forward
    }
    uppers = [name for name in plan.levels if plan.differentiated(name) and name not in plan.nested]
    if not any(name in carrying for upper in uppers for name in plan.differentiated(upper)):
        return Passes(0, 0)
    due = Counter(
        tuple(name for name in uppers if _structure.is_due(plan.levels[name], time))
        for time in range(1, iterations + 1)
    )
    total = Passes(0, 0)
    for together, times in due.items():
        live = {name for upper in together for name in (upper, *plan.differentiated(upper))}
        for name, level in carrying.items():
            above = [plan.levels[upper] for upper in together if name in plan.differentiated(upper)]
            responses = 1 + sum(upper.steps - 1 for upper in above) if above else 0
            read = sum(size(plan.levels[read].variables) for read in plan.depends_on(name) if read in live)
            total = _sum(total, _times(times * responses, level.hypergradient.cost_of_reads(level.steps, read)))
    return total


def of_pullback(plan: Plan, upper: str, name: str) -> Passes:
    """What one pullback of level `name` costs on the way to `upper`, with all that happens below it."""
    return _Prediction(plan).pullback(name, {upper, *plan.differentiated(upper)})


@final
@dataclass(frozen=True, eq=False)
class _Prediction:
    """The parts a nest is made of, as `mlo._nest` and `mlo._response` take them."""

    plan: Plan

    def responses(self, names: Any) -> Passes:
        """Responses of `names` in the order of the program; below one in the middle they are taken to where it leads."""
        total, seen = Passes(0, 0), set[str]()
        waiting = list(names)
        while waiting:
            name = waiting.pop(0)
            if name not in seen:
                seen.add(name)
                total = _sum(total, _times(self.plan.levels[name].steps, self.gradient(name, {name})))
                waiting = [*self.plan.differentiated(name), *waiting]
        return total

    def sweeps(self, name: str) -> int:
        """Pullbacks that level `name` and those below it make for their own steps in one response, all retaken."""
        if name not in self.plan.nested:
            return 0
        level, below = self.plan.levels[name], self.plan.differentiated(name)
        inner = sum(self.sweeps(lower) for lower in below)
        return level.steps * (len(below) + inner) + inner

    def gradient(self, name: str, towards: set[str], *, recorded: bool = False) -> Passes:
        """One gradient of level `name`, total if it is in the middle."""
        total = Passes(1, 0)
        if name not in self.plan.nested:
            return total
        below = self.plan.differentiated(name)
        for lower in below:
            level = self.plan.levels[lower]
            total = _sum(total, _times(level.steps, self.gradient(lower, {lower})))
            live = {*towards, *below}
            if name in towards or live & set(self.plan.depends_on(lower)):
                total = _sum(total, self.pullback(lower, live))
            if recorded:
                total = _sum(total, _nesting(level).recording)
        return total

    def pullback(self, name: str, live: set[str]) -> Passes:
        """One pullback of level `name` to the levels in `live`."""
        level = self.plan.levels[name]
        players = self.players(name, live)
        numbers = sum(size(self.plan.levels[player].variables) for player in players)
        cost = level.hypergradient.cost(level.steps, numbers)
        if not level.hypergradient.tape(level.steps, numbers).forward:  # what is carried along is paid for elsewhere
            read = sum(size(self.plan.levels[read].variables) for read in self.plan.depends_on(name) if read in live)
            cost = _sum(cost, level.hypergradient.cost_of_reads(level.steps, read))
        if name not in self.plan.nested:
            again = 0 if current_group() is None else level.hypergradient.tape(level.steps, numbers).recorded
            return Passes(cost.gradients + again, cost.products)
        compared = min(_nesting(level).plain, cost.gradients)
        towards = set(self.plan.depends_on(name)) & live
        plain = self.gradient(name, towards)
        if level.nested == "direct":
            below = self.plan.differentiated(name)
            plain = _sum(
                Passes(1, 0),
                *(_times(self.plan.levels[lower].steps, self.gradient(lower, {lower})) for lower in below),
            )
        recorded = self.gradient(name, {name}, recorded=level.nested == "reduced")
        return _sum(
            _times(compared, plain),
            _times(cost.gradients - compared, recorded),
            _times(cost.products, Passes(0, 1), self.again(name)),
        )

    def players(self, name: str, live: set[str]) -> set[str]:
        """The level, and those of `live` that are pulled back together with it."""
        found, waiting = {name}, [name]
        while self.plan.levels[name].hypergradient.is_joint and waiting:
            new = (live & set(self.plan.levels[waiting.pop()].against)) - found
            found |= new
            waiting += new
        return found

    def again(self, name: str) -> Passes:
        """What a derivative of one total gradient of level `name` costs below it."""
        if self.plan.levels[name].nested == "direct":
            return Passes(0, 0)
        return _sum(*(_nesting(self.plan.levels[lower]).again for lower in self.plan.differentiated(name)))

    def recording(self, name: str) -> Passes:
        """What the steps of level `name` cost more because they are recorded."""
        level = self.plan.levels[name]
        if name not in self.plan.nested or level.nested == "direct":
            return Passes(0, 0)
        steps = level.hypergradient.tape(level.steps, size(level.variables)).recorded
        below = (_nesting(self.plan.levels[lower]).recording for lower in self.plan.differentiated(name))
        return _times(steps, *below)


def size(variables: Any) -> int:
    """How many numbers of a level are trained."""
    if isinstance(variables, nn.Module):
        return sum(tensor.numel() for tensor in variables.parameters() if tensor.requires_grad)
    return sum(tensor.numel() for tensor in (variables.values() if isinstance(variables, Mapping) else [variables]))


def _nesting(level: Level) -> Any:
    return level.hypergradient.nesting(level.steps, size(level.variables))


def _sum(*costs: Passes) -> Passes:
    return Passes(sum(cost.gradients for cost in costs), sum(cost.products for cost in costs))


def _times(count: int, *costs: Passes) -> Passes:
    total = _sum(*costs)
    return Passes(count * total.gradients, count * total.products)

"""One outer iteration: levels respond in run order, upper levels are differentiated by sweeping back over the responses.

All functions are pure over explicit state. The global RNG is seeded before every evaluation and restored by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _random, _tree
from mlo._errors import GraphError, Mistake, UserError
from mlo._finite import Finite
from mlo._modes import inside_transform
from mlo._nest import Below, Nest
from mlo._objective import ChangedInPlaceError, Record, options_of
from mlo._partials import partials
from mlo._plan import Plan
from mlo._reading import reads_live
from mlo._reduction import refuse_nesting
from mlo._response import Response, respond
from mlo._state import HYPERGRADIENT, Metrics, Norms, Parts, State, Tally, batch_of
from mlo._step import Position, Surroundings
from mlo._sweep import sweep
from mlo.optimizer import OptimizerState, updated

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._types import Tree


@final
@dataclass(eq=False)
class Iteration:
    """The inside of one iteration: the state it began with, the batches, and what has happened so far."""

    plan: Plan
    begin: State
    batches: Mapping[str, Any]
    now: dict[str, Position]
    begun: Mapping[str, Position]
    """Where each level stood when the iteration began."""
    number: int
    """Counted from 1."""
    tally: Tally = field(default_factory=Tally)
    losses: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    measured: dict[str, tuple[Mapping[str, Tensor], ...]] = field(default_factory=dict)
    norms: dict[str, tuple[Norms, ...]] = field(default_factory=dict)
    finite: Finite = field(default_factory=Finite)

    @classmethod
    def of(cls, plan: Plan, state: State, batches: Mapping[str, Any]) -> Iteration:
        """An iteration that has not begun."""
        now: dict[str, Position] = {}
        for name in plan.levels:
            now[name] = position(state, name)
        return cls(plan, state, batches, now, dict(now), state.iteration + 1, Tally(recalled=state.memory))

    def record(self, level: str, step: int) -> Record:
        """What `level` draws at its `step`: the same however often it is asked for."""
        seed = _random.key(self.begin.seed, level, self.number, step)
        return Record(batch_of(self.batches, level, step), seed, self.number)

    def respond(self, name: str, live: Iterable[str] = ()) -> Response:
        """The response of level `name`, from where it stood when the iteration began, to the others as they stand now."""
        level = self.plan.levels[name]
        values, buffers = self._seen_by(level)
        live = frozenset(live)
        towards = tuple([read for read in self.plan.depends_on(name) if read in live])
        nest = self._nest(level) if name in self.plan.nested else None
        around = Surroundings(self.plan.skeletons, values, buffers, towards, self.tally, nest)
        return respond(level, self.begun[name], around, self._records(level), steps=level.steps)

    def _records(self, level: Level) -> tuple[Record, ...]:
        return tuple([self.record(level.name, step) for step in range(max(1, level.steps))])

    def _nest(self, level: Level) -> Nest:
        """The levels below one in the middle, each as it stood when the iteration began.

        Raises `UserError` where a total gradient cannot be differentiated: inside a transform, or over processes.
        """
        if inside_transform():
            raise UserError(
                f"level '{level.name}' is in the middle of a nest, which cannot be differentiated inside a torch.func "
                "transform"
            )
        refuse_nesting(level.name)
        below: list[Below] = []
        for name in self.plan.differentiated(level.name):
            lower = self.plan.levels[name]
            opponents = {opponent: self.begun[opponent] for opponent in lower.against}
            inner = self._nest(lower) if self.plan.differentiated(name) else None
            start = self.begun[name]
            below.append(Below(lower, start, self.plan.depends_on(name), opponents, self._records(lower), inner))
        return Nest(level, self.plan.skeletons, below)

    def differentiate(
        self, upper: str, responses: Mapping[str, Response], step: int, *, whole: bool = False
    ) -> tuple[Parts, Tensor, Any]:
        """The hypergradient of `upper` by parts, its loss, and what its objective left, at its `step`.

        - `whole`: whether somebody will look at the cotangents in `tally` later on. Factors are right until an objective is
          evaluated again: it may read its next batch into the memory of this one.
        """
        level = self.plan.levels[upper]
        values, buffers = self._seen_by(level)
        self.tally.gradients += 1
        record, towards = self.record(upper, step), (upper, *responses)
        first = towards[-1]  # of the responses, the first that is pulled back: nothing is evaluated until then
        factored = first if responses and responses[first].takes_factors and not whole else None
        found, loss, aftermath = partials(level, self.plan.skeletons, values, buffers, record, towards, factored)
        cotangents = dict(found)
        direct = cotangents.pop(upper, None)
        within = {upper, *responses}
        responses = {name: response.towards(within) for name, response in responses.items()}
        through: dict[str, Tree] = {}
        for name, arrived in sweep(upper, responses, cotangents, self.tally).items():
            if upper in arrived:
                through[name] = arrived[upper]
        return Parts(partial=direct, through=through, like=values[upper]), loss, aftermath

    def descend(self, name: str, pulled: Iterable[str], live: Iterable[str]) -> dict[str, Response]:
        """A level takes its steps, and what it did is noted; below one in the middle, so is what they lead to.

        Those in `pulled` can be pulled back to the levels in `live`.
        """
        responses = self.retaken(name, pulled, live)
        for taken, response in responses.items():
            self.losses[taken], self.measured[taken] = response.losses, response.measured
            parts = [part for left in response.aftermaths for part in left.parts]
            if parts:
                totals = [self._last_hypergradient(taken), *(part.total for part in parts)]
                self.norms[taken] = tuple(map(Norms.of, parts, totals))
                self._remember_hypergradient(taken, totals[-1])
                self._look_at_norms(taken)
        return responses

    def ascend(self, name: str, responses: Mapping[str, Response], live: Iterable[str]) -> None:
        """An upper level takes its steps; the responses below it are taken anew for each but the first."""
        level = self.plan.levels[name]
        assert level.optimizer is not None
        losses, measured, norms = [], [], []
        kept = dict(self.now)
        before = self._last_hypergradient(name)
        for step in range(level.steps):
            if step:  # others that moved are due at the same time: responses see where they stood
                moved = {upper: kept[upper] for upper in self.norms if upper not in self.plan.nested}
                self.now.update({upper: self.begun[upper] for upper in moved})
                self.finite.numbers()  # where levels below have been need not be held any longer
                responses = self.respond_below(name, live)
                self.now.update(moved)
            parts, loss, aftermath = self.differentiate(name, responses, step)
            at = self.now[name]
            read = level.read_by_optimizer
            options = options_of(level, self.plan.skeletons, self._seen_by(level)[0]) if read else None
            variables, optimizer = updated(
                level.optimizer, self.number, parts.total, at.optimizer, at.variables, options
            )
            self.now[name] = Position(variables, {**at.buffers, **aftermath.buffers}, optimizer)
            losses.append(loss)
            measured.append(aftermath.measured)
            norms.append(Norms.of(parts, before))
            before = parts.total
            self.finite.add(name, step + 1, "the loss", loss)
            self._look_at_norms(name, step, norms[-1:])
        self._look_at_value(name, level.steps)
        self._remember_hypergradient(name, before)
        self.now.update({**kept, name: self.now[name]})
        self.losses[name], self.measured[name], self.norms[name] = tuple(losses), tuple(measured), tuple(norms)

    def respond_below(self, upper: str, live: Iterable[str]) -> dict[str, Response]:
        """The responses that `upper` differentiates through, taken anew in the order of the program."""
        found: dict[str, Response] = {}
        below = self.plan.differentiated(upper)
        for lower in below:
            if lower not in found:
                found |= self.retaken(lower, below, live)
        return {lower: found[lower] for lower in below}

    def retaken(self, name: str, pulled: Iterable[str], live: Iterable[str]) -> dict[str, Response]:
        """The response of level `name`; of one in the middle, then also those below it to where it leads."""
        found = {name: self.retake(name, live if name in pulled else ())}
        for lower in self.plan.differentiated(name):
            if lower not in found:
                found |= self.retaken(lower, pulled, live)
        return found

    def _remember_hypergradient(self, upper: str, last: Tree | None) -> None:
        if last is not None and not inside_transform():
            self.tally.remembered[upper, upper] = {HYPERGRADIENT: _tree.detach(last)}

    def _last_hypergradient(self, upper: str) -> Tree | None:
        """That of the last iteration in which `upper` was due, if it can be compared with those of this one."""
        before = self.begin.memory.get((upper, upper), {}).get(HYPERGRADIENT)
        fits = before is not None and not inside_transform() and _tree.alike(before, self.now[upper].variables)
        return before if fits else None

    def retake(self, name: str, live: Iterable[str]) -> Response:
        """The response of level `name`, which now stands where it leads."""
        response = self.respond(name, live)
        self.now[name] = response.end
        for step, loss in enumerate(response.losses, 1):
            self.finite.add(name, step, "the loss", loss)
        self._look_at_value(name, response.steps)
        return response

    def look_ahead(self, uppers: Iterable[str]) -> None:
        """Levels below `uppers` step back and take their steps again, seeing where the upper levels have moved."""
        below = {lower for upper in uppers for lower in self.plan.differentiated(upper)}
        middle = below & self.plan.nested
        inside = {lower for name in middle for lower in self.plan.differentiated(name)}
        for name in self.plan.levels:
            if name in below - inside:
                self.retaken(name, (), ())

    def _seen_by(self, level: Level) -> tuple[dict[str, Tree], dict[str, Mapping[str, Tensor]]]:
        """Values and buffers as `level` sees them: its opponents as they stood when the iteration began."""
        values: dict[str, Tree] = {}
        buffers: dict[str, Mapping[str, Tensor]] = {}
        for name in self.plan.surroundings(level.name):
            at = self.begun[name] if name in level.against else self.now[name]
            values[name], buffers[name] = at.variables, at.buffers
        return values, buffers

    def finish(self) -> tuple[State, Metrics]:
        """The state after the iteration and what it showed. Raises `NumericalError` for a number that is not finite."""
        self.finite.refuse(self.number)
        values: dict[str, Tree] = {}
        buffers: dict[str, Mapping[str, Tensor]] = {}
        optimizers: dict[str, OptimizerState] = {}
        for name, at in self.now.items():
            values[name] = at.variables
            if name in self.begin.buffers:
                buffers[name] = at.buffers
            if name in self.plan.moving:
                optimizers[name] = at.optimizer
        state = State(
            values=values,
            buffers=buffers,
            optimizers=optimizers,
            iteration=self.number,
            seed=self.begin.seed,
            memory=self.tally.memory(),
        )
        metrics = Metrics(
            losses={name: losses[-1] for name, losses in self.losses.items() if losses},
            norms={name: norms[-1] for name, norms in self.norms.items() if norms},
            measured={name: _mean(measured) for name, measured in self.measured.items() if measured and measured[-1]},
            pullbacks=tuple(self.tally.pullbacks),
            gradients=self.tally.gradients,
            products=self.tally.products,
            reports=self.tally.reports,
        )
        return state, metrics

    def _look_at_norms(self, name: str, first: int = 0, norms: Sequence[Norms] | None = None) -> None:
        """Those of `norms`, or of all steps of level `name`, where the first is that of step `first`, counted from 0."""
        for step, each in enumerate(self.norms[name] if norms is None else norms, first + 1):
            self.finite.add(name, step, "the direct part of the hypergradient", each.direct)
            for lower, norm in each.through.items():
                self.finite.add(name, step, f"the part of the hypergradient through '{lower}'", norm)

    def _look_at_value(self, name: str, step: int) -> None:
        """A finite loss can have a gradient that is not, as √|w| has at 0, and leave a level nowhere."""
        self.finite.add_all(name, step, "the new value", self.now[name].variables)


_UNMOVED = OptimizerState()
_REQUIRES_GRAD = attrgetter("requires_grad")


def position(state: State, name: str) -> Position:
    """Where level `name` stands in `state`."""
    variables = state.values[name]
    if not inside_transform() and any(map(_REQUIRES_GRAD, _tree.leaves(variables))):
        variables = _tree.detach(variables)
    return Position(variables, state.buffers.get(name, {}), state.optimizers.get(name, _UNMOVED))


def step(plan: Plan, state: State, batches: Mapping[str, Any]) -> tuple[State, Metrics]:
    """One outer iteration: every level that is due takes its steps, in run order."""
    return taken(plan, state, batches).finish()


def taken(plan: Plan, state: State, batches: Mapping[str, Any]) -> Iteration:
    """`step`, before its numbers are looked at."""
    inside = Iteration.of(plan, state, batches)
    agenda = plan.agenda(inside.number)
    responses: dict[str, Response] = {}
    try:
        for name in agenda.due:
            if name in agenda.uppers:
                below = {lower: responses[lower] for lower in plan.differentiated(name)}
                inside.ascend(name, below, agenda.live)
            else:
                pulled = agenda.pulled - agenda.inner if name in agenda.inner else agenda.pulled
                responses |= inside.descend(name, pulled, agenda.live)
        if agenda.ahead:
            inside.look_ahead(agenda.ahead)
    except ChangedInPlaceError:  # nobody can tell any more what was finite
        raise
    except Exception:  # an objective that stumbles over NaN is not at fault: who brought it about is
        inside.finite.refuse(inside.number)
        raise
    return inside


def parts(plan: Plan, upper: str, state: State, batches: Mapping[str, Any]) -> Parts:
    """The hypergradient of `upper` by parts: levels it is subject to take their steps from `state`, which stays as it is."""
    inside = Iteration.of(plan, state, batches)
    responses = inside.respond_below(upper, (upper, *plan.differentiated(upper)))
    return inside.differentiate(upper, responses, 0)[0]


def refuse_separable(plan: Plan, upper: str, state: State, batches: Mapping[str, Any]) -> None:
    """Raise `GraphError` if the gradient of a level below `upper` does not depend on anything that leads back to it.

    f = a(w) + b(u) has a gradient in u and no cross derivative: methods without a second derivative of their own would
    find zero there and no error. Where an operator has none at all, nothing can be said. A level whose optimizer reads one
    that leads back is differentiated through its steps, where a part that is missing is an error anyway.
    """
    inside = Iteration.of(plan, state, batches)
    live = (upper, *plan.differentiated(upper))
    for name, response in inside.respond_below(upper, live).items():
        method = response.level.hypergradient  # players that are pulled back together reach back together
        if not method.differentiates or method.is_joint or reads_live(plan.levels[name].optimizer, live):
            continue
        try:
            reached = response.linearise(chunks=method.divides_into).cross(response.end.variables)
        except (RuntimeError, NotImplementedError):
            continue
        if not reached:
            reason = f"the response of '{name}' does not reach back to '{upper}': in its objective they do not meet"
            raise GraphError([Mistake(upper, "subject_to", reason)])


def _mean(steps: tuple[Mapping[str, Tensor], ...]) -> dict[str, Tensor]:
    """The mean over steps of what was measured at all of them, in one shape."""
    if len(steps) == 1:
        return dict(steps[0])
    shapes = {name: {seen[name].shape if name in seen else None for seen in steps} for name in steps[0]}
    alike = [name for name, found in shapes.items() if len(found) == 1]
    return {name: torch.stack([seen[name].double() for seen in steps]).mean(0) for name in alike}

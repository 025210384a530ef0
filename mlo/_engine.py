"""One outer iteration: levels respond in run order, upper levels are differentiated by sweeping back over the responses.

All functions are pure over explicit state. The global RNG is seeded before every evaluation and restored by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _random, _tree
from mlo._autodiff import inside_transform
from mlo._errors import GraphError, Mistake, NumericalError
from mlo._objective import Record, partials
from mlo._response import Response, respond
from mlo._state import Metrics, Norms, Parts, State, Tally, batch_of
from mlo._step import Position, Surroundings
from mlo._structure import is_due
from mlo.optimizer import OptimizerState, updated

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._module import Skeleton
    from mlo._types import Tree


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """A graph as the engine needs it: levels by name in run order, and the code of their modules."""

    levels: Mapping[str, Level]
    skeletons: Mapping[str, Skeleton]

    def differentiated(self, upper: str) -> tuple[str, ...]:
        """The levels whose responses `upper` differentiates through, in run order."""
        listed = self.levels[upper].subject_to
        return tuple(name for name, level in self.levels.items() if name in listed and not level.frozen)


@final
@dataclass(eq=False)
class Iteration:
    """The inside of one iteration: the state it began with, the batches, and what has happened so far."""

    plan: Plan
    begin: State
    batches: Mapping[str, Any]
    now: dict[str, Position]
    tally: Tally = field(default_factory=Tally)
    losses: dict[str, tuple[Tensor, ...]] = field(default_factory=dict[str, "tuple[Tensor, ...]"])
    measured: dict[str, tuple[Mapping[str, Tensor], ...]] = field(
        default_factory=dict[str, "tuple[Mapping[str, Tensor], ...]"]
    )
    norms: dict[str, tuple[Norms, ...]] = field(default_factory=dict[str, "tuple[Norms, ...]"])
    numbers: list[tuple[str, int, str, Tensor]] = field(default_factory=list["tuple[str, int, str, Tensor]"])
    """What must be finite, in the order in which it came about: level, step, term, number."""

    @classmethod
    def of(cls, plan: Plan, state: State, batches: Mapping[str, Any]) -> Iteration:
        """An iteration that has not begun."""
        return cls(plan, state, batches, {name: position(state, name) for name in plan.levels})

    @property
    def number(self) -> int:
        """Counted from 1."""
        return self.begin.iteration + 1

    def record(self, level: str, step: int) -> Record:
        """What `level` draws at its `step`: the same however often it is asked for."""
        seed = _random.key(self.begin.seed, level, self.number, step)
        return Record(batch_of(self.batches, level, step), seed, self.number)

    def respond(self, name: str, live: Iterable[str] = ()) -> Response:
        """The response of level `name`, from where it stood when the iteration began, to the others as they stand now."""
        level = self.plan.levels[name]
        values, buffers = self._seen_by(level)
        towards = tuple(read for read in level.given if read in set(live))
        around = Surroundings(self.plan.skeletons, values, buffers, towards, self.tally)
        records = [self.record(name, step) for step in range(max(1, level.steps))]
        return respond(level, position(self.begin, name), around, records, steps=level.steps)

    def differentiate(self, upper: str, responses: Mapping[str, Response], step: int) -> tuple[Parts, Tensor, Any]:
        """The hypergradient of `upper` by parts, its loss, and what its objective left, at its `step`."""
        level = self.plan.levels[upper]
        values, buffers = self._seen_by(level)
        self.tally.gradients += 1
        found, loss, aftermath = partials(
            level, self.plan.skeletons, values, buffers, self.record(upper, step), (upper, *responses)
        )
        cotangents = dict(found)
        direct = cotangents.pop(upper, None)
        through = self._sweep(upper, responses, cotangents)
        return Parts(direct=_tree.zeros(values[upper]) if direct is None else direct, through=through), loss, aftermath

    def _sweep(self, upper: str, responses: Mapping[str, Response], cotangents: dict[str, Tree]) -> dict[str, Tree]:
        """Walk the responses in reverse run order, adding cotangents where arrows meet; one pullback each."""
        through: dict[str, Tree] = {}
        idle: set[str] = set()  # pass nothing on: their method costs nothing without steps, and there are none
        for name in reversed(list(responses)):
            response = responses[name]
            if name not in cotangents and any(name in responses[reader].level.given for reader in idle):
                idle.add(name)
                continue
            if name not in cotangents:
                reason = f"'{name}' is read neither by the objective nor by another level that is listed"
                raise GraphError([Mistake(upper, "subject_to", f"{reason}; its part would be a silent zero")])
            self.tally.pullbacks.append((upper, name))
            self.tally.cotangents[upper, name] = cotangents[name]
            upstream = response.level.hypergradient.pullback(response, cotangents[name])
            for read, cotangent in upstream.items():
                if read == upper:
                    through[name] = cotangent
                elif read in responses:
                    known = cotangents.get(read)
                    cotangents[read] = cotangent if known is None else _tree.add(known, cotangent)
            if not response.steps and response.level.hypergradient.cost(0, response.size) == (0, 0):
                idle.add(name)
            elif not any(read == upper or read in responses for read in upstream):
                reason = (
                    f"the response of '{name}' does not reach back to '{upper}': its objective does not depend on it"
                )
                raise GraphError([Mistake(upper, "subject_to", reason)])
        return through

    def descend(self, name: str, live: Iterable[str]) -> Response:
        """A level that is subject to none takes its steps."""
        response = self.retake(name, live)
        self.losses[name] = response.losses
        self.measured[name] = response.measured
        return response

    def ascend(self, name: str, responses: Mapping[str, Response], live: Iterable[str]) -> None:
        """An upper level takes its steps; the responses below it are taken anew for each but the first."""
        level = self.plan.levels[name]
        assert level.optimizer is not None
        losses, measured, norms = [], [], []
        kept = {lower: self.now[lower] for lower in responses}
        moved = {upper: self.now[upper] for upper in self.norms}  # due at the same time: responses see where they stood
        for step in range(level.steps):
            if step:
                self.now.update({upper: position(self.begin, upper) for upper in moved})
                responses = {lower: self.retake(lower, live) for lower in responses}
                self.now.update(moved)
            parts, loss, aftermath = self.differentiate(name, responses, step)
            at = self.now[name]
            variables, optimizer = updated(level.optimizer, self.number, parts.total, at.optimizer, at.variables)
            self.now[name] = Position(variables, {**at.buffers, **aftermath.buffers}, optimizer)
            losses.append(loss)
            measured.append(aftermath.measured)
            norms.append(Norms.of(parts))
            self.numbers += [
                (name, step + 1, "the loss", loss),
                (name, step + 1, "the direct part of the hypergradient", norms[-1].direct),
                *(
                    (name, step + 1, f"the part of the hypergradient through '{lower}'", norm)
                    for lower, norm in norms[-1].through.items()
                ),
            ]
        self._look_at_value(name, level.steps)
        self.now.update(kept)
        self.losses[name], self.measured[name], self.norms[name] = tuple(losses), tuple(measured), tuple(norms)

    def retake(self, name: str, live: Iterable[str]) -> Response:
        """The response of level `name`, which now stands where it leads."""
        response = self.respond(name, live)
        self.now[name] = response.end
        self.numbers += [(name, step, "the loss", loss) for step, loss in enumerate(response.losses, 1)]
        self._look_at_value(name, response.steps)
        return response

    def look_ahead(self, uppers: Iterable[str]) -> None:
        """Levels below `uppers` step back and take their steps again, seeing where the upper levels have moved."""
        below = {lower for upper in uppers for lower in self.plan.differentiated(upper)}
        for name in self.plan.levels:
            if name in below:
                self.retake(name, ())

    def _seen_by(self, level: Level) -> tuple[dict[str, Tree], dict[str, Mapping[str, Tensor]]]:
        """Values and buffers as `level` sees them: its opponents as they stood when the iteration began."""
        seen = {name: self.now[name] for name in (level.name, *level.given, *level.subject_to)}
        seen |= {name: position(self.begin, name) for name in level.against}
        return {name: at.variables for name, at in seen.items()}, {name: at.buffers for name, at in seen.items()}

    def finish(self) -> tuple[State, Metrics]:
        """The state after the iteration and what it showed. Raises `NumericalError` for a number that is not finite."""
        self.refuse_non_finite()
        moving = [name for name, level in self.plan.levels.items() if not level.frozen]
        state = State(
            values={name: at.variables for name, at in self.now.items()},
            buffers={name: at.buffers for name, at in self.now.items() if name in self.begin.buffers},
            optimizers={name: self.now[name].optimizer for name in moving},
            iteration=self.number,
            seed=self.begin.seed,
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

    def _look_at_value(self, name: str, step: int) -> None:
        """A finite loss can have a gradient that is not, as √|w| has at 0, and leave a level nowhere."""
        self.numbers.append((name, step, "the new value", _tree.sum_of(self.now[name].variables)))

    def refuse_non_finite(self) -> None:
        """One look at all numbers together; who was first is asked only if there is something to ask."""
        if inside_transform() or not self.numbers:
            return
        if bool(torch.stack([number.double() for *_, number in self.numbers]).isfinite().all()):
            return
        level, step, term, _ = next(entry for entry in self.numbers if not bool(entry[3].isfinite()))
        raise NumericalError(level=level, step=step, term=term, iteration=self.number)


def position(state: State, name: str) -> Position:
    """Where level `name` stands in `state`."""
    return Position(state.values[name], state.buffers.get(name, {}), state.optimizers.get(name, OptimizerState()))


def step(plan: Plan, state: State, batches: Mapping[str, Any]) -> tuple[State, Metrics]:
    """One outer iteration: every level that is due takes its steps, in run order."""
    inside = Iteration.of(plan, state, batches)
    due = [name for name, level in plan.levels.items() if is_due(level, inside.number)]
    uppers = [name for name in due if plan.differentiated(name)]
    live = {name for upper in uppers for name in (upper, *plan.differentiated(upper))}
    pulled = {name for upper in uppers for name in plan.differentiated(upper)}
    responses: dict[str, Response] = {}
    try:
        for name in due:
            if name in uppers:
                below = {lower: responses[lower] for lower in plan.differentiated(name)}
                inside.ascend(name, below, live)
            else:
                responses[name] = inside.descend(name, live if name in pulled else ())
        inside.look_ahead(name for name in uppers if plan.levels[name].lookahead)
    except Exception:
        inside.refuse_non_finite()  # an objective that stumbles over NaN is not at fault: who brought it about is
        raise
    return inside.finish()


def parts(plan: Plan, upper: str, state: State, batches: Mapping[str, Any]) -> Parts:
    """The hypergradient of `upper` by parts: levels it is subject to take their steps from `state`, which stays as it is."""
    inside = Iteration.of(plan, state, batches)
    below = plan.differentiated(upper)
    responses = {name: inside.retake(name, (upper, *below)) for name in below}
    return inside.differentiate(upper, responses, 0)[0]


def refuse_separable(plan: Plan, upper: str, state: State, batches: Mapping[str, Any]) -> None:
    """Raise `GraphError` if the gradient of a level below `upper` does not depend on anything that leads back to it.

    f = a(w) + b(u) has a gradient in u and no cross derivative: methods without a second derivative of their own would
    find zero there and no error. Where an operator has none at all, nothing can be said.
    """
    inside = Iteration.of(plan, state, batches)
    below = plan.differentiated(upper)
    for name in below:
        response = inside.retake(name, (upper, *below))
        try:
            reached = response.linearise().cross(response.end.variables)
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

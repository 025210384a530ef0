"""Let a level take its steps, and remember what a pullback needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from mlo import _tree
from mlo._autodiff import linearise, recorded_gradient
from mlo._errors import GraphError, Mistake
from mlo._objective import Aftermath, Record, evaluate, partials
from mlo._reduction import refuse_recording
from mlo.hypergradient import AbstractResponse, AbstractStep
from mlo.optimizer import OptimizerState

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._module import Skeleton
    from mlo._state import Tally
    from mlo._types import Tree, Upstream


@final
@dataclass(frozen=True, eq=False)
class Position:
    """Where a level stands: variables, buffers, optimizer state."""

    variables: Tree
    buffers: Mapping[str, Tensor]
    optimizer: OptimizerState


@final
@dataclass(frozen=True, eq=False)
class Surroundings:
    """What a level sees around it while it takes its steps: held fixed but for the levels in `live`."""

    skeletons: Mapping[str, Skeleton]
    values: Mapping[str, Tree]
    buffers: Mapping[str, Mapping[str, Tensor]]
    live: tuple[str, ...]
    tally: Tally


@final
@dataclass(frozen=True, eq=False)
class Step(AbstractStep):
    """One optimizer step that was taken."""

    level: Level
    around: Surroundings
    at: Position
    record: Record
    gradient: Tree

    @property
    def start(self) -> Tree:
        """See `AbstractStep`."""
        return self.at.variables

    def pull_update(self, cotangent: Tree) -> Tree:
        """See `AbstractStep`."""
        optimizer = self.level.optimizer
        assert optimizer is not None

        def update(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
            return optimizer.update(moving[""], self.at.optimizer, self.at.variables)[0], ()

        _, _, pull = linearise(update, {"": self.gradient})
        return pull(cotangent, ("",))[""]

    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """See `AbstractStep`."""
        self.around.tally.gradients += 1
        values = {**self.around.values, self.level.name: variables}
        buffers = {**self.around.buffers, self.level.name: self.at.buffers}
        return partials(self.level, self.around.skeletons, values, buffers, self.record, self.around.live)[0]


@final
@dataclass(frozen=True, eq=False)
class Response(AbstractResponse):
    """The steps of one level in one iteration: where they led, what they measured, and how to pull back."""

    level: Level
    end: Position
    losses: tuple[Tensor, ...]
    measured: tuple[Mapping[str, Tensor], ...]
    around: Surroundings
    last_step: Step | None
    recorded_steps: int
    pull: Callable[..., Upstream] | None

    @property
    def steps(self) -> int:
        """See `AbstractResponse`."""
        return len(self.losses)

    def pull_recorded(self, cotangent: Tree) -> Upstream:
        """See `AbstractResponse`."""
        assert self.pull is not None, "no step was recorded"
        self.around.tally.products += self.recorded_steps
        return self.pull(cotangent, self.around.live, retain=True)

    def last(self) -> AbstractStep:
        """See `AbstractResponse`."""
        assert self.last_step is not None, "no step was taken"
        return self.last_step


def respond(level: Level, start: Position, around: Surroundings, records: Sequence[Record]) -> Response:
    """The response of `level`: one optimizer step from `start` for each of `records`.

    If levels around it are live, as many steps at the end as its method asks for are recorded for differentiation. One
    gradient a step.
    """
    recorded = min(len(records), level.hypergradient.recorded(len(records))) if around.live else 0
    plain = len(records) - recorded
    position, losses, measured, last = start, [], [], None
    for record in records[:plain]:
        position, last, loss, seen = _step(level, position, around, record)
        losses.append(loss)
        measured.append(seen)
    pull = None
    if recorded:
        refuse_recording(level.name)
        position, late_losses, late_measured, pull = _record(level, position, around, records[plain:])
        losses += late_losses
        measured += late_measured
        last = None
    return Response(level, position, tuple(losses), tuple(measured), around, last, recorded, pull)


def _step(
    level: Level, at: Position, around: Surroundings, record: Record
) -> tuple[Position, Step, Tensor, Mapping[str, Tensor]]:
    around.tally.gradients += 1
    values = {**around.values, level.name: at.variables}
    buffers = {**around.buffers, level.name: at.buffers}
    found, loss, aftermath = partials(level, around.skeletons, values, buffers, record, (level.name,))
    gradient = _connected(level, found.get(level.name))
    assert level.optimizer is not None
    variables, optimizer = level.optimizer.update(gradient, at.optimizer, at.variables)
    step = Step(level, around, at, record.with_choices(aftermath.choices), gradient)
    return Position(variables, aftermath.buffers, optimizer), step, loss, aftermath.measured


def _record(
    level: Level, start: Position, around: Surroundings, records: Sequence[Record]
) -> tuple[Position, list[Tensor], list[Mapping[str, Tensor]], Callable[..., Upstream]]:
    """Take steps and keep their graph with respect to the live levels."""
    around.tally.gradients += len(records)
    optimizer = level.optimizer
    assert optimizer is not None

    def steps(live: Mapping[str, Tree]) -> tuple[Tree, tuple[Any, ...]]:
        at, losses, measured = start, [], []
        values = {**around.values, **live}
        for record in records:

            def objective(own: Tree, at: Position = at, record: Record = record) -> tuple[Tensor, Aftermath]:
                buffers = {**around.buffers, level.name: at.buffers}
                return evaluate(level, around.skeletons, {**values, level.name: own}, buffers, record)

            found, loss, aftermath = recorded_gradient(objective, at.variables)
            gradient = _connected(level, found)
            variables, state = optimizer.update(gradient, at.optimizer, at.variables)
            at = Position(variables, aftermath.buffers, state)
            losses.append(loss.detach())
            measured.append(aftermath.measured)
        moments = {name: _tree.detach(moment) for name, moment in at.optimizer.moments.items()}
        return at.variables, (at.buffers, moments, losses, measured)

    variables, (buffers, moments, losses, measured), pull = linearise(
        steps, {name: around.values[name] for name in around.live}
    )
    count = start.optimizer.count + len(records)
    return Position(variables, buffers, OptimizerState(count=count, moments=moments)), losses, measured, pull


def _connected(level: Level, gradient: Tree | None) -> Tree:
    if gradient is None:
        raise GraphError([Mistake(level.name, "objective", "it does not depend on the level's own variables")])
    return gradient

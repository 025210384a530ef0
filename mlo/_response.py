"""Let a level take its steps, and remember what a pullback needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from mlo import _tree
from mlo._autodiff import linearise, recorded_gradient
from mlo._linearisation import Linearisation
from mlo._objective import Aftermath, Record, evaluate
from mlo._reduction import refuse_recording
from mlo._retaken import Retaken
from mlo._step import Position, Step, Surroundings, connected, take
from mlo.hypergradient import AbstractLinearisation, AbstractResponse, AbstractStep, Tape
from mlo.optimizer import OptimizerState, updated

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._types import Tree, Upstream


@final
@dataclass(frozen=True, eq=False)
class Response(AbstractResponse):
    """The steps of one level in one iteration: where they led, what they measured, and how to pull back.

    `rest` is what a linearisation at the end is evaluated on: the record of the last step and the buffers it began with.
    """

    level: Level
    end: Position
    losses: tuple[Tensor, ...]
    measured: tuple[Mapping[str, Tensor], ...]
    around: Surroundings
    kept: Sequence[Step]
    rest: tuple[Record, Mapping[str, Tensor]]
    recorded: int = 0
    pull: Callable[..., Upstream] | None = None

    @property
    def steps(self) -> int:
        """See `AbstractResponse`."""
        return len(self.losses)

    @property
    def size(self) -> int:
        """See `AbstractResponse`."""
        return _tree.size(self.end.variables)

    def pull_recorded(self, cotangent: Tree) -> Upstream:
        """See `AbstractResponse`."""
        assert self.pull is not None, "no step was recorded"
        self.around.tally.products += self.recorded
        return self.pull(cotangent, self.around.live, retain=True)

    def taken(self) -> Sequence[AbstractStep]:
        """See `AbstractResponse`."""
        return self.kept

    def linearise(self) -> AbstractLinearisation:
        """See `AbstractResponse`."""
        record, buffers = self.rest
        at = Position(self.end.variables, buffers, self.end.optimizer)
        return Linearisation(self.level, self.around, at, record)


def respond(level: Level, start: Position, around: Surroundings, records: Sequence[Record], *, steps: int) -> Response:
    """The response of `level`: `steps` optimizer steps from `start`, one for each of `records`.

    Without steps, the one record is what a linearisation at `start` is evaluated on. If levels around it are live, as
    much of the steps is kept as its method asks for. One gradient a step.
    """
    tape = level.hypergradient.tape(steps, _tree.size(start.variables)) if around.live else Tape(0, 0)
    recorded = min(steps, tape.recorded)
    first = steps - tape.kept  # that may be asked for again
    position, losses, measured = start, list["Tensor"](), list[Mapping[str, "Tensor"]]()
    starts, again = list[Position](), list[Record]()
    kept: deque[Step] = deque(maxlen=max(1, tape.kept) if tape.every == 1 else 1)
    rest = (records[-1], start.buffers)
    for number, record in enumerate(records[: steps - recorded]):
        if kept:
            kept[-1] = replace(kept[-1], gradient=None)
        position, last, loss, seen = take(level, position, around, record)
        rest = (last.record, last.at.buffers)
        kept.append(last)
        if tape.every > 1 and number >= first:
            again.append(last.record)
            if (number - first) % tape.every == 0:
                starts.append(last.at)
        losses.append(loss)
        measured.append(seen)
    if not recorded:
        taken = Retaken(level, around, starts, again, tape.every) if again else tuple(kept)
        return Response(level, position, tuple(losses), tuple(measured), around, taken, rest)
    refuse_recording(level.name)
    position, late_losses, late_measured, last, pull = _record(
        level, position, around, records[steps - recorded : steps]
    )
    return Response(
        level,
        position,
        (*losses, *late_losses),
        (*measured, *late_measured),
        around,
        (last,),
        (last.record, last.at.buffers),
        recorded,
        pull,
    )


def _record(
    level: Level, start: Position, around: Surroundings, records: Sequence[Record]
) -> tuple[Position, list[Tensor], list[Mapping[str, Tensor]], Step, Callable[..., Upstream]]:
    """Take steps and keep their graph with respect to the live levels. Also gives the last step by itself."""
    around.tally.gradients += len(records)
    optimizer = level.optimizer
    assert optimizer is not None

    def steps(live: Mapping[str, Tree]) -> tuple[Tree, tuple[Any, ...]]:
        at, losses, measured = start, [], []
        before, gradient, choices = start, start.variables, {}
        values = {**around.values, **live}
        for record in records:

            def objective(own: Tree, at: Position = at, record: Record = record) -> tuple[Tensor, Aftermath]:
                buffers = {**around.buffers, level.name: at.buffers}
                return evaluate(level, around.skeletons, {**values, level.name: own}, buffers, record)

            found, loss, aftermath = recorded_gradient(objective, at.variables)
            before, gradient, choices = at, connected(level, found), aftermath.choices
            variables, state = updated(optimizer, record.iteration, gradient, at.optimizer, at.variables)
            at = Position(variables, aftermath.buffers, state)
            losses.append(loss.detach())
            measured.append(aftermath.measured)
        return at.variables, (_numbers(at), losses, measured, (*_numbers(before), _tree.detach(gradient), choices))

    live = {name: around.values[name] for name in around.live}
    variables, (end, losses, measured, (*before, gradient, choices)), pull = linearise(steps, live)
    count = start.optimizer.count + len(records)
    at = _position(before, count - 1)
    last = Step(level, around, at, records[-1].with_choices(choices), gradient)
    return _position((variables, *end[1:]), count), losses, measured, last, pull


def _numbers(at: Position) -> tuple[Tree, Mapping[str, Tensor], Mapping[str, Tree]]:
    """The tensors of a position without their history: what a transform lets out."""
    moments = {name: _tree.detach(moment) for name, moment in at.optimizer.moments.items()}
    return _tree.detach(at.variables), dict(at.buffers), moments


def _position(numbers: Sequence[Any], count: int) -> Position:
    variables, buffers, moments = numbers
    return Position(variables, buffers, OptimizerState(count=count, moments=moments))

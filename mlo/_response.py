"""Let a level take its steps, and remember what a pullback needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from mlo import _random, _tree
from mlo._autodiff import is_recorded, linearise, refuse_drawing
from mlo._factored import takes_factors
from mlo._linearisation import Linearisation
from mlo._modes import inside_transform
from mlo._objective import Aftermath, Record, options_of
from mlo._reduction import current_group
from mlo._retaken import Retaken
from mlo._step import Position, Step, Surroundings, connected, followed, joined, linearised, recorded, regrouped, take
from mlo._tangent import Tangent, advanced, at_rest, contracted, units
from mlo.hypergradient import AbstractLinearisation, AbstractResponse, AbstractStep, Tape, Unroll
from mlo.hypergradient._unroll import replayed
from mlo.optimizer import OptimizerState, multiple_of_cotangent, updated

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._state import Parts
    from mlo._types import Tree, Upstream


@final
@dataclass(frozen=True, eq=False)
class Response(AbstractResponse):
    """The steps of one level in one iteration: where they led, what they left, and how to pull back.

    `rest` is what a linearisation at the end is evaluated on: the record of the last step and the buffers it began with.
    `swept` steps at the end were asked to be recorded; under several processes they are kept instead, and `pull` is None.
    `begin` and `records` are what is needed to take all steps again.
    `takes_factors`: whether it makes use of a cotangent that is left as `mlo._factored.Factored`. Methods of the user's own
    get a tree of tensors.
    """

    level: Level
    end: Position
    losses: tuple[Tensor, ...]
    aftermaths: tuple[Aftermath, ...]
    around: Surroundings
    kept: Sequence[Step]
    rest: tuple[Record, Mapping[str, Tensor]]
    begin: Position
    records: tuple[Record, ...]
    swept: int = 0
    pull: Callable[..., Upstream] | None = None
    tangents: tuple[Tangent, ...] = ()
    takes_factors: bool = False

    @property
    def steps(self) -> int:
        """See `AbstractResponse`."""
        return len(self.losses)

    @property
    def size(self) -> int:
        """See `AbstractResponse`."""
        return _tree.size(self.end.variables)

    @property
    def measured(self) -> tuple[Mapping[str, Tensor], ...]:
        """What the objective measured at each step."""
        return tuple([aftermath.measured for aftermath in self.aftermaths])

    def towards(self, names: set[str]) -> Response:
        """The same, to be pulled back to no other levels than these."""
        if names.issuperset(self.around.live):
            return self
        live = tuple(name for name in self.around.live if name in names)
        return replace(self, around=self.around._replace(live=live))

    @property
    def recorded(self) -> int:
        """See `AbstractResponse`."""
        return self.swept

    def pull_recorded(self, cotangent: Tree) -> Upstream:
        """See `AbstractResponse`."""
        assert self.swept, "no step was recorded"
        if self.pull is None:
            return replayed(self.kept[-self.swept :], cotangent)
        self.around.tally.products += self.swept
        return self.pull(cotangent, self.around.live, retain=True)

    def contract(self, cotangent: Tree) -> Upstream:
        """See `AbstractResponse`."""
        return contracted(list(self.tangents), cotangent)

    def directions(self, count: int | None) -> Sequence[Upstream]:
        """See `AbstractResponse`. Random ones are keyed by the seed of the last step."""
        reads = {name: self.around.values[name] for name in self.around.live}
        numbers = sum(map(_tree.size, reads.values()))
        if count is None or count >= numbers:
            return units(reads)
        like = _tree.leaves(next(iter(reads.values())))[0]
        refuse_drawing(self.level.name)
        drawn = _random.normal(like.new_empty(numbers, count), self.rest[0].seed, "directions")
        found: list[Upstream] = []
        for column in torch.linalg.qr(drawn)[0].unbind(1):
            sizes = [leaf.numel() for tree in reads.values() for leaf in _tree.leaves(tree)]
            shapes = [leaf.shape for tree in reads.values() for leaf in _tree.leaves(tree)]
            parts = [part.view(shape) for part, shape in zip(column.split(sizes), shapes, strict=True)]
            found.append(regrouped(reads, parts))
        return found

    def retaken(self, direction: Upstream, *, scale: float) -> Tree:
        """See `AbstractResponse`."""
        moved = {name: _tree.add(self.around.values[name], tree, scale=scale) for name, tree in direction.items()}
        tally = replace(self.around.tally, gradients=0, products=0, pullbacks=[])  # none of its sweeps is a level's own
        around = self.around._replace(values={**self.around.values, **moved}, live=(), tally=tally)
        end = respond(self.level, self.begin, around, self.records, steps=self.steps).end.variables
        self.around.tally.gradients += tally.gradients
        self.around.tally.products += tally.products
        return end

    def taken(self) -> Sequence[AbstractStep]:
        """See `AbstractResponse`."""
        return self.kept

    def linearise(self, *, chunks: int = 1) -> AbstractLinearisation:
        """See `AbstractResponse`."""
        record, buffers = self.rest
        at = Position(self.end.variables, buffers, self.end.optimizer)
        last = self.kept[-1] if self.steps else None
        return Linearisation(self.level, self.around, at, record, last, chunks=chunks)


def respond(level: Level, start: Position, around: Surroundings, records: Sequence[Record], *, steps: int) -> Response:
    """The response of `level`: `steps` optimizer steps from `start`, one for each of `records`.

    Without steps, the one record is what a linearisation at `start` is evaluated on. If levels around it are live, as
    much of the steps is kept as its method asks for. One gradient a step. Where the values around it have a history that
    is being recorded, so has the response: its derivative is the pullback of its method, and can be differentiated again.
    """
    recording = is_recorded(around.values.values())
    tape = level.hypergradient.tape(steps, _tree.size(start.variables)) if recording or around.live else Tape(0, 0)
    replaced = 0
    if current_group() is not None:  # a recorded step would have to be differentiated through its reduction
        replaced = min(steps, tape.recorded)
        tape = tape._replace(recorded=0, kept=max(replaced, tape.kept))
    begun = steps - min(steps, tape.recorded)
    found = _taken(level, around, start, records, tape, begun, recording=recording) if begun or tape.forward else None
    if begun < steps:
        one = steps - begun == 1 and level.has_closed_pullback and not (recording or inside_transform())
        at = start if found is None else found.end
        last = (_record_one if one else _record)(level, around, at, records[begun:steps])
        found = last if found is None else found.followed_by(last)
    elif found is None:
        found = _Steps(start, (), (), (), (records[-1], start.buffers))
    response = Response(
        level=level,
        end=found.end,
        losses=found.losses,
        aftermaths=found.aftermaths,
        around=around,
        kept=found.kept,
        rest=found.rest,
        begin=start,
        records=tuple(records),
        swept=replaced if found.pull is None else steps - begun,
        pull=found.pull,
        tangents=found.tangents,
        takes_factors=found.takes_factors and type(level.hypergradient) is Unroll,
    )
    return _with_history(response) if recording and found.pull is None else response


class _Steps(NamedTuple):
    """Steps that were taken: where they led, what they left, what is kept of them, and what the last one was evaluated on.

    With the tangents that were carried along, and how to pull back through those whose graph was kept.
    """

    end: Position
    losses: tuple[Tensor, ...]
    aftermaths: tuple[Aftermath, ...]
    kept: Sequence[Step]
    rest: tuple[Record, Mapping[str, Tensor]]
    tangents: tuple[Tangent, ...] = ()
    pull: Callable[..., Upstream] | None = None
    takes_factors: bool = False

    def followed_by(self, last: _Steps) -> _Steps:
        """These and `last`, which began where they led, and of which alone anything is kept."""
        losses, aftermaths = (*self.losses, *last.losses), (*self.aftermaths, *last.aftermaths)
        return last._replace(losses=losses, aftermaths=aftermaths, tangents=self.tangents)


def _taken(
    level: Level,
    around: Surroundings,
    position: Position,
    records: Sequence[Record],
    tape: Tape,
    steps: int,
    *,
    recording: bool,
) -> _Steps:
    """Take the first `steps` steps without their graph, and keep of them what `tape` says."""
    every, first = 1 if recording else tape.every, steps - tape.kept  # the first that may be asked for again
    losses: list[Tensor] = []
    aftermaths: list[Aftermath] = []
    starts: list[Position] = []
    again: list[Record] = []
    kept: deque[Step] = deque(maxlen=max(1, tape.kept) if every == 1 else 1)
    rest = (records[-1], position.buffers)
    tangents: list[Tangent] = []
    with torch.no_grad() if recording else nullcontext():
        fixed = _without_history(around) if recording else around
        if tape.forward and not recording:
            tangents = at_rest(position, fixed)
        forgets = level.has_closed_pullback and not tangents
        for number, record in enumerate(records[:steps]):
            if kept.maxlen == 1:
                kept.clear()  # and its gradient, before there is another
            elif kept:
                kept[-1] = kept[-1].bare(moments=recording or not level.has_closed_pullback)
            # A recorded response is pulled back towards other levels than it is taken for.
            compared = tape.compared and not recording and number == steps - 1
            position, last, loss, aftermath = take(level, position, fixed, record, forgets=forgets, compared=compared)
            tangents = advanced(last, tangents) if tangents else []
            rest = (last.record, last.at.buffers)
            kept.append(last)
            if every > 1 and number >= first:
                again.append(last.record)
                if (number - first) % every == 0:
                    starts.append(last.at)
            losses.append(loss)
            aftermaths.append(aftermath)
    held = Retaken(level, around, starts, again, every) if again else tuple(kept)
    return _Steps(position, tuple(losses), tuple(aftermaths), held, rest, tuple(tangents))


def _record_one(level: Level, around: Surroundings, at: Position, records: Sequence[Record]) -> _Steps:
    """`_record` of one step whose update has a pullback in closed form: only its gradient needs a graph.

    Not where it is recorded, nor inside a transform.
    """
    around.tally.gradients += 1
    (record,), optimizer = records, level.optimizer
    assert optimizer is not None

    evaluated, loss, aftermath, pull = linearised(level, around, at, record)
    gradient = evaluated()
    variables, state = updated(optimizer, record.iteration, gradient, at.optimizer, at.variables)
    multiple = multiple_of_cotangent(optimizer, record.iteration, at.optimizer.count)
    assert multiple is not None, "only SGD comes here"

    def pull_step(cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
        found = pull(cotangent, names, retain=retain)  # κ comes last: there are fewer numbers than in the cotangent
        return {name: _tree.scale(tree, by=multiple) for name, tree in found.items()}

    last = Step(level, around, at, record.with_choices(aftermath.choices), None)
    end = Position(variables, aftermath.buffers, state)
    return _Steps(
        end,
        (loss,),
        (aftermath,),
        (last,),
        (last.record, at.buffers),
        pull=pull_step,
        takes_factors=takes_factors(pull),
    )


def _record(level: Level, around: Surroundings, start: Position, records: Sequence[Record]) -> _Steps:
    """Take steps and keep their graph with respect to the live levels."""
    around.tally.gradients += len(records)
    optimizer = level.optimizer
    assert optimizer is not None

    parts = list[tuple["Parts", ...]]()

    def steps(live: Mapping[str, Tree]) -> tuple[Tree, tuple[Any, ...]]:
        at, losses, left = start, list["Tensor"](), list[Any]()
        before, gradient = start, start.variables
        values = {**around.values, **live}
        options = options_of(level, around.skeletons, values)
        for record in records:
            buffers = {**around.buffers, level.name: at.buffers}
            found, loss, aftermath = followed(level, around, values, at.variables, buffers, record)
            before, gradient = at, connected(level, found)
            variables, state = updated(optimizer, record.iteration, gradient, at.optimizer, at.variables, options)
            at = Position(variables, aftermath.buffers, state)
            losses.append(loss.detach())
            left.append((aftermath.measured, aftermath.buffers, aftermath.choices))
            parts.append(aftermath.parts)
        stood = (_tree.detach(before.variables), *_left(before), _tree.detach(gradient))
        return at.variables, (_left(at), losses, left, stood)

    live = {name: around.values[name] for name in (*around.live, *recorded(around.values)[0])}
    variables, (end, losses, left, (*stood, gradient)), pull = linearise(steps, live)
    count = start.optimizer.count + len(records)
    aftermaths = [Aftermath(*each)._replace(parts=part) for each, part in zip(left, parts, strict=True)]
    at = _position(stood, count - 1)
    last = Step(level, around, at, records[-1].with_choices(aftermaths[-1].choices), gradient)
    end = _position((variables, *end), count)
    return _Steps(end, tuple(losses), tuple(aftermaths), (last,), (last.record, at.buffers), pull=pull)


def _left(at: Position) -> tuple[Mapping[str, Tensor], Mapping[str, Tree]]:
    """The tensors of a position beside its variables, without their history: what a transform lets out."""
    return dict(at.buffers), {name: _tree.detach(moment) for name, moment in at.optimizer.moments.items()}


def _position(numbers: Sequence[Any], count: int) -> Position:
    variables, buffers, moments = numbers
    return Position(variables, buffers, OptimizerState(count=count, moments=moments))


def _without_history(around: Surroundings) -> Surroundings:
    return around._replace(values={name: _tree.detach(tree) for name, tree in around.values.items()})


# A response that is itself differentiated: a primitive whose derivative is the pullback of its method.


def _with_history(response: Response) -> Response:
    """`response` as a recorded function of the values around it; so are the places its kept steps started from."""
    names, inputs = recorded(response.around.values)
    kept = [replace(step, around=response.around) for step in response.kept]
    for index in range(1, len(kept)):
        kept[index] = replace(kept[index], at=_stepped(kept[index - 1], response.kept[index].at, names, inputs))
    end: Any = _Responded.apply(response, tuple(kept), names, *inputs)
    variables = _tree.rebuild(response.end.variables, end)
    return replace(response, end=response.end._replace(variables=variables), kept=tuple(kept))


class _Responded(torch.autograd.Function):
    """w*(u), whose pullback is that of the level's method. Made of recorded functions, it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, response: Response, kept: tuple[Step, ...], names: tuple[str, ...], *tensors: Tensor) -> Any:
        end = [tensor.detach() for tensor in _tree.leaves(response.end.variables)]
        ctx.response, ctx.kept, ctx.names, ctx.count = response, kept, names, len(end)
        ctx.save_for_backward(*end, *tensors)
        return tuple(end)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        response: Response = ctx.response
        again = torch.is_grad_enabled()
        end, tensors = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        trees = {name: response.around.values[name] for name in ctx.names}
        around = _at(response.around, regrouped(trees, tensors), again=again)
        kept = ctx.kept if again else [replace(step, around=around) for step in response.kept]
        if again:
            variables = _tree.rebuild(response.end.variables, end)
            kept = [replace(step, around=around) for step in kept]
            response = replace(response, end=response.end._replace(variables=variables))
        response = replace(response, around=around, kept=tuple(kept))
        cotangent = _tree.rebuild(response.end.variables, weights)
        found = response.level.hypergradient.pullback(response, cotangent)
        return None, None, None, *_in_order(trees, found)


class _Stepped(torch.autograd.Function):
    """One optimizer step, (w', s') from (w, s) and the values around, whose pullback evaluates it again."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, after: Position, names: tuple[str, ...], trees: Mapping[str, Tree], *tensors: Tensor
    ) -> Any:
        ctx.step, ctx.names, ctx.trees, ctx.after = step, names, trees, after
        ctx.save_for_backward(*tensors)
        return tuple(tensor.detach() for tensor in joined({"": after.variables, **after.optimizer.moments}).values())

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        step: Step = ctx.step
        again = torch.is_grad_enabled()
        trees = regrouped(ctx.trees, ctx.saved_tensors)
        if not again:
            trees = {name: _tree.detach(tree) for name, tree in trees.items()}
        moments = {key: trees[f":{key}"] for key in step.at.optimizer.moments}
        at = Position(trees[":"], step.at.buffers, OptimizerState(step.at.optimizer.count, moments))
        around = _at(step.around, {name: trees[name] for name in ctx.names}, again=again)
        shapes: dict[str, Tree] = {"": ctx.after.variables, **ctx.after.optimizer.moments}
        given = regrouped(shapes, weights)
        own, stood, found = replace(step, at=at, around=around).replay(given.pop(""), given)
        everything = {":": own, **{f":{key}": tree for key, tree in stood.items()}, **found}
        return None, None, None, None, *_in_order(ctx.trees, everything)


def _stepped(step: Step, after: Position, names: tuple[str, ...], inputs: Sequence[Tensor]) -> Position:
    """`after`, where `step` leads, as a recorded function of where it started and of the values around it."""
    stood = {":": step.at.variables, **{f":{key}": tree for key, tree in step.at.optimizer.moments.items()}}
    trees: dict[str, Tree] = {**stood, **{name: step.around.values[name] for name in names}}
    begun = [leaf for tree in stood.values() for leaf in _tree.leaves(tree)]
    moved: Any = _Stepped.apply(step, after, names, trees, *begun, *inputs)
    shapes: dict[str, Tree] = {"": after.variables, **after.optimizer.moments}
    found = regrouped(shapes, moved)
    return Position(found.pop(""), after.buffers, OptimizerState(after.optimizer.count, found))


def _at(around: Surroundings, values: Mapping[str, Tree], *, again: bool) -> Surroundings:
    """`around` at `values`, which become its live levels; without any history unless it is recorded `again`."""
    everything = {**around.values, **values}
    if not again:
        everything = {name: _tree.detach(tree) for name, tree in everything.items()}
    return around._replace(values=everything, live=tuple(values))


def _in_order(trees: Mapping[str, Tree], found: Upstream) -> list[Tensor | None]:
    """The tensors of `found` in the order of `trees`, None for those that are not there."""
    return [
        leaf if name in found else None
        for name, tree in trees.items()
        for leaf in (_tree.leaves(found[name]) if name in found else _tree.leaves(tree))
    ]

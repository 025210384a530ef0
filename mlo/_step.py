"""One optimizer step of a level: take it, pull back through it, take it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from mlo import _tree
from mlo._autodiff import gradient_with_pullback, is_recorded, linearise, recorded_gradient
from mlo._errors import GraphError, Mistake
from mlo._factored import factored_gradient
from mlo._modes import Recording, inside_transform, known
from mlo._objective import Aftermath, Record, evaluate, options_of, shares
from mlo._partials import difference_of_partials, partials, shared_partials
from mlo._reading import reads_live
from mlo._reduction import current_group, reduced_trees
from mlo._shared import Shared
from mlo.hypergradient import AbstractStep
from mlo.optimizer import OptimizerState, multiple_of_cotangent, pulled_back, updated

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._module import Skeleton
    from mlo._state import Tally
    from mlo._types import Tree, Upstream


class Position(NamedTuple):
    """Where a level stands: variables, buffers, optimizer state."""

    variables: Tree
    buffers: Mapping[str, Tensor]
    optimizer: OptimizerState


class AbstractNest(ABC):
    """The levels below one in the middle of a nest: what it minimises depends on their responses to it."""

    @abstractmethod
    def partials(
        self,
        values: Mapping[str, Tree],
        buffers: Mapping[str, Mapping[str, Tensor]],
        record: Record,
        towards: tuple[str, ...],
        tally: Tally,
    ) -> tuple[Upstream, Tensor, Aftermath]:
        """The total gradient of the level's objective towards other levels, its loss, and what the evaluation leaves."""

    @abstractmethod
    def partials_of_step(
        self,
        values: Mapping[str, Tree],
        buffers: Mapping[str, Mapping[str, Tensor]],
        record: Record,
        towards: tuple[str, ...],
        tally: Tally,
        start: Tree,
    ) -> Upstream:
        """The gradient towards other levels, as far as it belongs to the derivative of the gradient followed at `start`."""


class Surroundings(NamedTuple):
    """What a level sees around it while it takes its steps: held fixed but for the levels in `live`.

    With a `nest`, the gradient the level follows is the total one, through the responses of the levels below it. `upper`
    is the level it responds to where it is itself below one in a nest.
    """

    skeletons: Mapping[str, Skeleton]
    values: Mapping[str, Tree]
    buffers: Mapping[str, Mapping[str, Tensor]]
    live: tuple[str, ...]
    tally: Tally
    nest: AbstractNest | None = None
    upper: str | None = None


@final
@dataclass(frozen=True, eq=False)
class Step(AbstractStep):
    """One optimizer step that was taken.

    `gradient` is kept of the last one, and only where its update has no pullback in closed form: None is evaluated again if
    asked for. Of the others the moments are not kept either, where their numbers do not matter for the pullback: see `bare`.

    `shared` is what its evaluation computed that others need as well, for one pullback; others compute it again.
    """

    level: Level
    around: Surroundings
    at: Position
    record: Record
    gradient: Tree | None
    shared: Shared | None = None

    def bare(self, *, moments: bool) -> Step:
        """The same, with nothing kept that can be evaluated again. Without `moments` only a closed form pulls it back."""
        at = self.at
        if not moments:
            at = Position(at.variables, at.buffers, OptimizerState(at.optimizer.count))
        return Step(self.level, self.around, at, self.record, None)

    @property
    def start(self) -> Tree:
        """See `AbstractStep`."""
        return self.at.variables

    def pull_update(self, cotangent: Tree) -> Tree:
        """See `AbstractStep`. Where it is recorded, the gradient is too, which takes another one."""
        optimizer, gradient = self.level.optimizer, self.gradient
        assert optimizer is not None
        if is_recorded((self.start, *self.around.values.values())):
            self.around.tally.gradients += 1
            buffers = {**self.around.buffers, self.level.name: self.at.buffers}
            found, _, _ = followed(self.level, self.around, self.around.values, self.start, buffers, self.record)
            gradient = connected(self.level, found)
        else:
            closed = pulled_back(optimizer, self.record.iteration, self.at.optimizer, cotangent, {})
            if closed is not None:
                return closed[0]
            if gradient is None:
                gradient = take(self.level, self.at, self.around, self.record)[1].gradient
        assert gradient is not None
        options = options_of(self.level, self.around.skeletons, self.around.values)

        def update(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
            at = self.at
            return updated(optimizer, self.record.iteration, moving[""], at.optimizer, at.variables, options)[0], ()

        _, _, pull = linearise(update, {"": gradient})
        return pull(cotangent, ("",))[""]

    @property
    def multiple(self) -> float | Tensor | None:
        """See `AbstractStep`. None where it is recorded."""
        optimizer = self.level.optimizer
        assert optimizer is not None
        if is_recorded((self.start, *self.around.values.values())):
            return None
        return multiple_of_cotangent(optimizer, self.record.iteration, self.at.optimizer.count)

    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """See `AbstractStep`."""
        return gradient_of_reads(self.level, self.around, variables, self.at, self.record)

    def difference_of_reads(self, places: Iterable[Tree]) -> Upstream:
        """See `AbstractStep`. What the objective shares is computed once."""
        return difference_of_reads(self.level, self.around, places, self.at, self.record, self.shared)

    def known(self, value: Tensor) -> float | None:
        """See `AbstractLinearisation`."""
        return known(value)

    def replay(self, cotangent: Tree, moments: Upstream) -> tuple[Tree, Upstream, Upstream]:
        """See `AbstractStep`. First the update is pulled back, at the gradient it was given, then that gradient."""
        level, around, optimizer = self.level, self.around, self.level.optimizer
        assert optimizer is not None
        around.tally.gradients += 1
        around.tally.products += 1
        evaluated, _, _, pull = linearised(level, around, self.at, self.record)
        closed = pulled_back(optimizer, self.record.iteration, self.at.optimizer, cotangent, moments)
        if closed is None:
            gradient = evaluated()
            if current_group() is not None:  # the update is the same in every process, as its gradient was
                gradient = reduced_trees({"": gradient}, self.record.batch, level.name)[0][""]
            names = {option.level for _, option in reads_live(optimizer, around.live)}
            read = {name: around.values[name] for name in names}
            closed = self._pull_whole_update(gradient, cotangent, moments, read)
        towards_gradient, before, own, options = closed
        pulled = pull(towards_gradient, (level.name, *around.live))
        found, _ = reduced_trees(pulled, self.record.batch, level.name)
        if level.name in found:
            own = _tree.add(own, found[level.name])
        upstream = {name: found[name] for name in around.live if name in found}
        for name, tree in options.items():
            upstream[name] = _tree.add(upstream[name], tree) if name in upstream else tree
        return own, before, upstream

    def _pull_whole_update(
        self, gradient: Tree, cotangent: Tree, moments: Upstream, read: Mapping[str, Tree]
    ) -> tuple[Tree, Upstream, Tree, Upstream]:
        """`pulled_back`, by automatic differentiation of the update at `gradient`; also to the levels in `read`."""
        level, optimizer, before = self.level, self.level.optimizer, self.at.optimizer
        assert optimizer is not None

        def update(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
            state = OptimizerState(before.count, {key: moving[_MOMENT + key] for key in before.moments})
            seen = {**self.around.values, **{name: moving[name] for name in read}}
            options, own = options_of(level, self.around.skeletons, seen), moving[_START]
            after, kept = updated(optimizer, self.record.iteration, moving[_GRADIENT], state, own, options)
            return joined({"": after, **kept.moments}), ()

        stood = {_MOMENT + key: moment for key, moment in before.moments.items()}
        result, _, pull = linearise(update, {_GRADIENT: gradient, _START: self.start, **stood, **read})
        given = joined({"": cotangent, **moments})
        weights = {key: given.get(key, tensor.new_zeros(tensor.shape)) for key, tensor in _tree.named(result).items()}
        found = pull(weights, (_GRADIENT, _START, *stood, *read))
        own, towards_gradient = (found.get(name, _tree.zeros(self.start)) for name in (_START, _GRADIENT))
        towards_moments = {key: found[_MOMENT + key] for key in before.moments if _MOMENT + key in found}
        return towards_gradient, towards_moments, own, {name: found[name] for name in read if name in found}


_GRADIENT, _START, _MOMENT = "::gradient", "::start", ":"
"""What goes into an update besides levels, whose names are identifiers; the last one before the name of a moment."""


def joined(trees: Mapping[str, Tree]) -> dict[str, Tensor]:
    """Several trees as one, by the name of the tree and of the tensor."""
    return {f"{key}/{name}": tensor for key, tree in trees.items() for name, tensor in _tree.named(tree).items()}


def recorded(values: Mapping[str, Tree]) -> tuple[tuple[str, ...], list[Tensor]]:
    """The names in `values` of trees that have a history, and their tensors in that order."""
    names = tuple(name for name, tree in values.items() if is_recorded((tree,)))
    return names, [leaf for name in names for leaf in _tree.leaves(values[name])]


def regrouped(trees: Mapping[str, Tree], tensors: Iterable[Tensor]) -> dict[str, Tree]:
    """`tensors` in the shapes of `trees`, one after the other."""
    rest = iter(tensors)
    return {name: _tree.rebuild(tree, [next(rest) for _ in _tree.leaves(tree)]) for name, tree in trees.items()}


def take(
    level: Level, at: Position, around: Surroundings, record: Record, *, forgets: bool = False, compared: bool = False
) -> tuple[Position, Step, Tensor, Aftermath]:
    """One step of `level` from `at`: where it leads, the step itself, its loss and what was left behind. One gradient.

    - `forgets`: whether its gradient is not kept.
    - `compared`: whether `difference_of_reads` will be asked for. What the objective shares is then kept for it.
    """
    around.tally.gradients += 1
    values = {**around.values, level.name: at.variables}
    buffers = {**around.buffers, level.name: at.buffers}
    shared = None
    if compared and shares(level) and not _unshared(around):
        found, loss, aftermath, shared = shared_partials(level, around.skeletons, values, buffers, record, around.live)
    else:
        found, loss, aftermath = gradients(level, around, values, buffers, record, (level.name,))
    gradient = connected(level, found.get(level.name))
    assert level.optimizer is not None
    options = options_of(level, around.skeletons, values)
    variables, optimizer = updated(level.optimizer, record.iteration, gradient, at.optimizer, at.variables, options)
    kept = None if forgets else gradient
    step = Step(level, around, at, record.with_choices(aftermath.choices), kept, shared)
    return Position(variables, aftermath.buffers, optimizer), step, loss, aftermath


def gradients(
    level: Level,
    around: Surroundings,
    values: Mapping[str, Tree],
    buffers: Mapping[str, Mapping[str, Tensor]],
    record: Record,
    towards: tuple[str, ...],
) -> tuple[Upstream, Tensor, Aftermath]:
    """`partials` of what `level` minimises: of its objective, or of that with the responses below it."""
    if around.nest is None:
        return partials(level, around.skeletons, values, buffers, record, towards)
    return around.nest.partials(values, buffers, record, towards, around.tally)


def followed(
    level: Level,
    around: Surroundings,
    values: Mapping[str, Tree],
    own: Tree,
    buffers: Mapping[str, Mapping[str, Tensor]],
    record: Record,
) -> tuple[Tree | None, Tensor, Aftermath]:
    """The gradient that `level` follows at `own`, as a recorded function of it and of `values`. None if there is none."""
    if around.nest is None:

        def objective(own: Tree) -> tuple[Tensor, Aftermath]:
            return evaluate(level, around.skeletons, {**values, level.name: own}, buffers, record)

        return recorded_gradient(objective, own)
    with Recording():
        point = _tree.apply(lambda tensor: tensor if tensor.requires_grad else tensor.detach().requires_grad_(), own)
        everything = {**values, level.name: point}
        found, loss, aftermath = around.nest.partials(everything, buffers, record, (level.name,), around.tally)
    return found.get(level.name), loss, aftermath


def linearised(
    level: Level, around: Surroundings, at: Position, record: Record
) -> tuple[Callable[[], Tree], Tensor, Aftermath, Callable[..., Upstream]]:
    """The gradient that `level` follows where it stands `at`, linearised in its own variables and in the live levels.

    What gives it, the loss, what the evaluation leaves, and the pullback: see `mlo._autodiff.linearise`. One gradient.
    Raises `GraphError` where there is none.
    """
    buffers = {**around.buffers, level.name: at.buffers}
    places = {level.name: at.variables}
    for name in around.live:
        places[name] = around.values[name]
    if around.nest is None and not (inside_transform() or is_recorded(places.values())):

        def objective(moving: Mapping[str, Tree]) -> tuple[Tensor, Aftermath]:
            return evaluate(level, around.skeletons, {**around.values, **moving}, buffers, record)

        skeleton = around.skeletons.get(level.name)
        if skeleton is not None and skeleton.may_be_watched:
            given, loss, aftermath, pull = factored_gradient(objective, places, level.name)
            if given is None:
                raise _disconnected(level)
            return given, loss, aftermath, pull
        gradient, loss, aftermath, pull = gradient_with_pullback(objective, places, level.name)
        found = connected(level, gradient)
        return lambda: found, loss, aftermath, pull

    def gradient_there(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[Tensor, Aftermath]]:
        values = {**around.values, **moving}
        found, loss, aftermath = followed(level, around, values, moving[level.name], buffers, record)
        return connected(level, found), (loss.detach(), aftermath)

    found, (loss, aftermath), pull = linearise(gradient_there, places)
    return lambda: found, loss, aftermath, pull


def gradient_of_reads(level: Level, around: Surroundings, variables: Tree, at: Position, record: Record) -> Upstream:
    """∂f/∂u for the live levels u around `level`, which stands `at`, with its variables at `variables`. One gradient."""
    around.tally.gradients += 1
    values = {**around.values, level.name: variables}
    buffers = {**around.buffers, level.name: at.buffers}
    if around.nest is None:
        return partials(level, around.skeletons, values, buffers, record, around.live)[0]
    return around.nest.partials_of_step(values, buffers, record, around.live, around.tally, at.variables)


def difference_of_reads(
    level: Level,
    around: Surroundings,
    places: Iterable[Tree],
    at: Position,
    record: Record,
    shared: Shared | None = None,
) -> Upstream:
    """`gradient_of_reads` at the first of two places less that at the second, with what is shared computed once."""
    if _unshared(around):
        return _tree.difference(*(gradient_of_reads(level, around, place, at, record) for place in places))
    around.tally.gradients += 2
    buffers = {**around.buffers, level.name: at.buffers}
    if shared is not None and shared.used:
        shared = None
    return difference_of_partials(level, around.skeletons, around.values, buffers, record, around.live, places, shared)


def _unshared(around: Surroundings) -> bool:
    """Whether evaluations are recorded, traced or made of responses themselves, so that each has to stand by itself."""
    return around.nest is not None or inside_transform() is not None or is_recorded(around.values.values())


def connected(level: Level, gradient: Tree | None) -> Tree:
    """`gradient`, which is None where the objective of `level` does not depend on the level's own variables."""
    if gradient is None:
        raise _disconnected(level)
    return gradient


def _disconnected(level: Level) -> GraphError:
    advice = f"does it read values['{level.name}'], outside `no_grad` and `detach`?"
    return GraphError([Mistake(level.name, "objective", f"it does not depend on the level's own variables; {advice}")])

"""One optimizer step of a level: take it, pull back through it, take it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo._autodiff import linearise, recorded_gradient
from mlo._errors import GraphError, Mistake
from mlo._objective import Aftermath, Record, evaluate, partials
from mlo._reduction import refuse_recording
from mlo.hypergradient import AbstractStep
from mlo.optimizer import OptimizerState, pulled_back, updated

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
    """One optimizer step that was taken. `gradient` is kept of the last one only: None is evaluated again if asked for."""

    level: Level
    around: Surroundings
    at: Position
    record: Record
    gradient: Tree | None

    @property
    def start(self) -> Tree:
        """See `AbstractStep`."""
        return self.at.variables

    def pull_update(self, cotangent: Tree) -> Tree:
        """See `AbstractStep`."""
        level, optimizer = self.level, self.level.optimizer
        assert optimizer is not None
        gradient = self.gradient
        if gradient is None:
            gradient = take(level, self.at, self.around, self.record)[1].gradient
            assert gradient is not None

        def update(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
            return updated(optimizer, self.record.iteration, moving[""], self.at.optimizer, self.at.variables)[0], ()

        _, _, pull = linearise(update, {"": gradient})
        return pull(cotangent, ("",))[""]

    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """See `AbstractStep`."""
        self.around.tally.gradients += 1
        values = {**self.around.values, self.level.name: variables}
        buffers = {**self.around.buffers, self.level.name: self.at.buffers}
        return partials(self.level, self.around.skeletons, values, buffers, self.record, self.around.live)[0]

    def replay(self, cotangent: Tree, moments: Upstream) -> tuple[Tree, Upstream, Upstream]:
        """See `AbstractStep`."""
        level, around, optimizer = self.level, self.around, self.level.optimizer
        assert optimizer is not None
        refuse_recording(level.name)
        around.tally.gradients += 1
        around.tally.products += 1
        buffers = {**around.buffers, level.name: self.at.buffers}

        def gradient(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
            own = moving[level.name]
            values = {**around.values, **{name: moving[name] for name in around.live}}

            def objective(own: Tree) -> tuple[Tensor, Aftermath]:
                return evaluate(level, around.skeletons, {**values, level.name: own}, buffers, self.record)

            found, _, _ = recorded_gradient(objective, own)
            return _joined({_GRADIENT: connected(level, found), _START: own}), ()

        live = {name: around.values[name] for name in around.live}
        result, _, pull = linearise(gradient, {level.name: self.start, **live})
        known = pulled_back(optimizer, self.record.iteration, self.at.optimizer, cotangent, moments)
        if known is None:
            known = self._pull_whole_update(_part(result, _GRADIENT, self.start), cotangent, moments)
        towards_gradient, before, own = known
        found = pull(_joined({_GRADIENT: towards_gradient, _START: own}), (level.name, *live))
        return found[level.name], before, {name: found[name] for name in live if name in found}

    def _pull_whole_update(self, gradient: Tree, cotangent: Tree, moments: Upstream) -> tuple[Tree, Upstream, Tree]:
        """`pulled_back`, by automatic differentiation of the update at `gradient`."""
        optimizer, before = self.level.optimizer, self.at.optimizer
        assert optimizer is not None

        def update(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
            state = OptimizerState(before.count, {key: moving[_MOMENT + key] for key in before.moments})
            iteration = self.record.iteration
            after, remembered = updated(optimizer, iteration, moving[_GRADIENT], state, moving[_START])
            return _joined({"": after, **remembered.moments}), ()

        stood = {_MOMENT + key: moment for key, moment in before.moments.items()}
        result, _, pull = linearise(update, {_GRADIENT: gradient, _START: self.start, **stood})
        given = _joined({"": cotangent, **moments})
        weights = {key: given.get(key, tensor.new_zeros(tensor.shape)) for key, tensor in _tree.named(result).items()}
        found = pull(weights, (_GRADIENT, _START, *stood))
        own, towards_gradient = (found.get(name, _tree.zeros(self.start)) for name in (_START, _GRADIENT))
        return towards_gradient, {key: found[_MOMENT + key] for key in before.moments if _MOMENT + key in found}, own


_GRADIENT, _START = ":gradient", ":start"
_MOMENT = ":"
"""Before the name of a moment: level names are identifiers."""


def _joined(trees: Mapping[str, Tree]) -> dict[str, Tensor]:
    """Several trees as one, by the name of the tree and of the tensor."""
    return {f"{key}/{name}": tensor for key, tree in trees.items() for name, tensor in _tree.named(tree).items()}


def _part(joined: Tree, key: str, like: Tree) -> Tree:
    """The tree that was joined under `key`."""
    table = _tree.named(joined)
    return _tree.rebuild(like, [table[f"{key}/{name}"] for name in _tree.named(like)])


def take(
    level: Level, at: Position, around: Surroundings, record: Record
) -> tuple[Position, Step, Tensor, Mapping[str, Tensor]]:
    """One step of `level` from `at`: where it leads, the step itself, its loss and what was measured. One gradient."""
    around.tally.gradients += 1
    values = {**around.values, level.name: at.variables}
    buffers = {**around.buffers, level.name: at.buffers}
    found, loss, aftermath = partials(level, around.skeletons, values, buffers, record, (level.name,))
    gradient = connected(level, found.get(level.name))
    assert level.optimizer is not None
    variables, optimizer = updated(level.optimizer, record.iteration, gradient, at.optimizer, at.variables)
    step = Step(level, around, at, record.with_choices(aftermath.choices), gradient)
    return Position(variables, aftermath.buffers, optimizer), step, loss, aftermath.measured


def connected(level: Level, gradient: Tree | None) -> Tree:
    """`gradient`, which is None where the objective of `level` does not depend on the level's own variables."""
    if gradient is None:
        advice = f"does it read values['{level.name}'], outside `no_grad` and `detach`?"
        raise GraphError(
            [Mistake(level.name, "objective", f"it does not depend on the level's own variables; {advice}")]
        )
    return gradient

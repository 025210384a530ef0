"""The gradient of what a level's optimizer minimises, linearised at its response: Hessian and cross products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _tree
from mlo._autodiff import inside_transform, linearise, recorded_gradient
from mlo._objective import evaluate, partials
from mlo._reduction import reduced_trees
from mlo._step import Position, Surroundings, connected
from mlo.hypergradient import AbstractLinearisation
from mlo.optimizer import l2_decays

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._objective import Record
    from mlo._types import Tree, Upstream

LOOK_EVERY = 5
"""Uses of a flag on an accelerator between two looks at it, each a synchronisation."""


@final
class Linearisation(AbstractLinearisation):
    """See `AbstractLinearisation`. The graph of one gradient is kept for as long as this is."""

    def __init__(self, level: Level, around: Surroundings, at: Position, record: Record) -> None:
        self._level, self._around, self._at = level, around, at
        assert level.optimizer is not None
        self._decays = l2_decays(level.optimizer, record.iteration, at.variables)
        self._looks = 0
        buffers = {**around.buffers, level.name: at.buffers}
        around.tally.gradients += 1

        def gradient(moving: Mapping[str, Tree]) -> tuple[Tree, dict[str, Any]]:
            values = {**around.values, **moving}
            found, _, aftermath = recorded_gradient(
                lambda own: evaluate(level, around.skeletons, {**values, level.name: own}, buffers, record),
                moving[level.name],
            )
            return connected(level, found), aftermath.choices

        live = {name: around.values[name] for name in around.live}
        self._gradient, choices, self._pull = linearise(gradient, {level.name: at.variables, **live})
        self._record = record.with_choices(choices)

    @property
    def variables(self) -> Tree:
        """See `AbstractLinearisation`."""
        return self._at.variables

    @property
    def gradient(self) -> Tree:
        """∂f/∂w with the decay, at the response, of which the Hessian is the derivative; 0 at a solution."""
        return self._decayed(self._gradient, self._at.variables)

    def hessian(self, direction: Tree) -> Tree:
        """See `AbstractLinearisation`."""
        name = self._level.name
        image = self._product(direction, (name,)).get(name)
        if image is None:  # the objective is linear in the level's own variables
            image = _tree.zeros(direction)
        return self._decayed(image, direction)

    def cross(self, direction: Tree) -> Upstream:
        """See `AbstractLinearisation`."""
        return self._product(direction, self._around.live)

    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """See `AbstractLinearisation`."""
        self._around.tally.gradients += 1
        level, around = self._level, self._around
        values = {**around.values, level.name: variables}
        buffers = {**around.buffers, level.name: self._at.buffers}
        return partials(level, around.skeletons, values, buffers, self._record, around.live)[0]

    def dense_solve(self, cotangent: Tree, *, damping: float) -> Tree:
        """See `AbstractLinearisation`."""
        vector = flat(cotangent)
        eye = torch.eye(len(vector), dtype=vector.dtype, device=vector.device)
        columns = [flat(self.hessian(shaped(cotangent, row))) for row in eye]
        solution, failed = torch.linalg.solve_ex(torch.stack(columns, dim=1) + damping * eye, vector)
        return shaped(cotangent, solution.where(failed == 0, float("nan")))

    def is_false(self, flag: Tensor) -> bool:
        """See `AbstractLinearisation`."""
        self._looks += 1
        if inside_transform() or (flag.is_cuda and self._looks % LOOK_EVERY):
            return False
        return not bool(flag)

    def report(self, name: str, value: Tensor) -> None:
        """See `AbstractLinearisation`."""
        tally = self._around.tally
        upper = tally.pullbacks[-1][0] if tally.pullbacks else self._level.name
        tally.reports.setdefault((upper, self._level.name), {})[name] = value.detach()

    def _decayed(self, tree: Tree, direction: Tree) -> Tree:
        """`tree` and what the decay, times the identity, makes of `direction`."""
        decays = [self._decays[key] or 0.0 for key in (direction if isinstance(direction, Mapping) else ("",))]
        if not any(decays):
            return tree
        pairs = zip(_tree.leaves(tree), _tree.leaves(direction), decays, strict=True)
        return _tree.rebuild(direction, [one.add(two, alpha=decay) for one, two, decay in pairs])

    def _product(self, direction: Tree, towards: tuple[str, ...]) -> Upstream:
        self._around.tally.products += 1
        return reduced_trees(self._pull(direction, towards, retain=True))


def flat(tree: Tree) -> Tensor:
    """All entries in one vector, tensor after tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in _tree.leaves(tree)])


def shaped(tree: Tree, vector: Tensor) -> Tree:
    """The entries of `vector` in the shape of `tree`."""
    tensors = _tree.leaves(tree)
    parts = vector.split([tensor.numel() for tensor in tensors])
    return _tree.rebuild(tree, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])

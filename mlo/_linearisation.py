"""The gradient of what a level's optimizer minimises, linearised at its response: Hessian and cross products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _dense, _random, _tree
from mlo._autodiff import inside_transform, linearise, recorded_gradient
from mlo._objective import evaluate, partials
from mlo._reduction import reduced_trees
from mlo._step import Position, Surroundings, connected
from mlo.hypergradient import AbstractLinearisation, AbstractStep
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

    def __init__(
        self, level: Level, around: Surroundings, at: Position, record: Record, last: AbstractStep | None = None
    ) -> None:
        self._level, self._around, self._at, self._last = level, around, at, last
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
        _, choices, self._pull = linearise(gradient, {level.name: at.variables, **live})
        self._record = record.with_choices(choices)

    @property
    def variables(self) -> Tree:
        """See `AbstractLinearisation`."""
        return self._at.variables

    def hessian(self, direction: Tree) -> Tree:
        """See `AbstractLinearisation`."""
        name = self._level.name
        image = self._product(direction, (name,)).get(name)
        if image is None:  # the objective is linear in the level's own variables
            image = _tree.zeros(direction)
        decays = [self._decays[key] or 0.0 for key in (direction if isinstance(direction, Mapping) else ("",))]
        if not any(decays):
            return image
        pairs = zip(_tree.leaves(image), _tree.leaves(direction), decays, strict=True)
        return _tree.rebuild(direction, [one.add(two, alpha=decay) for one, two, decay in pairs])

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
        vector = _flat(cotangent)
        eye = torch.eye(len(vector), dtype=vector.dtype, device=vector.device)
        columns = [_flat(self.hessian(_shaped(cotangent, row))) for row in eye]
        solution, failed = torch.linalg.solve_ex(torch.stack(columns, dim=1) + damping * eye, vector)
        return _shaped(cotangent, solution.where(failed == 0, float("nan")))

    def nystrom_solve(self, cotangent: Tree, *, rank: int, damping: float) -> Tree:
        """See `AbstractLinearisation`."""
        vector = _flat(cotangent)
        size = min(rank, len(vector))
        basis = torch.linalg.qr(torch.stack([_flat(self.normal(index)) for index in range(size)], dim=1))[0]
        columns = (_shaped(cotangent, column) for column in basis.unbind(1))
        images = torch.stack([_flat(self.hessian(column)) for column in columns], dim=1)
        solution, largest, negative = _dense.nystrom_solve(basis, images, vector, damping)
        self.report("lambda_max", largest)
        self.report("negative_curvature", negative)
        return _shaped(cotangent, solution)

    def pull_update(self, cotangent: Tree) -> Tree:
        """See `AbstractLinearisation`."""
        assert self._last is not None, "no step was taken"
        return self._last.pull_update(cotangent)

    def normal(self, index: int) -> Tree:
        """See `AbstractLinearisation`."""
        drawn = [
            _random.normal(tensor, self._record.seed, "normal", index, name)
            for name, tensor in _tree.named(self.variables).items()
        ]
        return _tree.rebuild(self.variables, drawn)

    def recall(self, name: str) -> Tree | None:
        """See `AbstractLinearisation`."""
        tree = self._around.tally.recalled.get(self._pair, {}).get(name)
        fits = tree is not None and not inside_transform() and _tree.alike(tree, self.variables)
        return tree if fits else None

    def remember(self, name: str, tree: Tree) -> None:
        """See `AbstractLinearisation`."""
        if not inside_transform():
            self._around.tally.remembered.setdefault(self._pair, {})[name] = _tree.detach(tree)

    def is_false(self, flag: Tensor) -> bool:
        """See `AbstractLinearisation`."""
        self._looks += 1
        if inside_transform() or (flag.is_cuda and self._looks % LOOK_EVERY):
            return False
        return not bool(flag)

    def report(self, name: str, value: Tensor) -> None:
        """See `AbstractLinearisation`."""
        self._around.tally.reports.setdefault(self._pair, {})[name] = value.detach()

    @property
    def _pair(self) -> tuple[str, str]:
        """The upper level it is pulled back for, and the level."""
        pullbacks = self._around.tally.pullbacks
        return pullbacks[-1][0] if pullbacks else self._level.name, self._level.name

    def _product(self, direction: Tree, towards: tuple[str, ...]) -> Upstream:
        self._around.tally.products += 1
        return reduced_trees(self._pull(direction, towards, retain=True))


def _flat(tree: Tree) -> Tensor:
    """All entries in one vector, tensor after tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in _tree.leaves(tree)])


def _shaped(tree: Tree, vector: Tensor) -> Tree:
    """The entries of `vector` in the shape of `tree`."""
    tensors = _tree.leaves(tree)
    parts = vector.split([tensor.numel() for tensor in tensors])
    return _tree.rebuild(tree, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])

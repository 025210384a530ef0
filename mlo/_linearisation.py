"""The gradient of what a level's optimizer minimises, linearised at its response: Hessian and cross products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _dense, _random, _tree
from mlo._autodiff import is_recorded, linearise, refuse_drawing
from mlo._chunks import Chunks
from mlo._modes import inside_transform, is_traced, known
from mlo._objective import options_of
from mlo._partials import partials
from mlo._reduction import reduced_trees
from mlo._step import (
    Position,
    Surroundings,
    connected,
    difference_of_reads,
    gradient_of_reads,
    linearised,
    recorded,
    regrouped,
)
from mlo.hypergradient import AbstractLinearisation, AbstractStep
from mlo.optimizer import l2_decays
from mlo.optimizer._arithmetic import add, is_zero

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._objective import Record
    from mlo._types import Tree, Upstream

LOOK_EVERY = 5
"""Uses of a flag on an accelerator between two looks at it, each a synchronisation."""


@final
class Linearisation(AbstractLinearisation):
    """See `AbstractLinearisation`. The graph of one gradient is kept for as long as this is; with `chunks`, none is.

    Of a level in the middle of a nest it is the total gradient that is linearised, and `hessian` is Jᵀv with its Jacobian.
    """

    def __init__(
        self,
        level: Level,
        around: Surroundings,
        at: Position,
        record: Record,
        last: AbstractStep | None = None,
        *,
        chunks: int = 1,
    ) -> None:
        self._level, self._around, self._at, self._last = level, around, at, last
        assert level.optimizer is not None
        options = options_of(level, around.skeletons, around.values)
        decays = l2_decays(level.optimizer, record.iteration, at.variables, options)
        self._decays = {name: 0.0 if decay is None else decay for name, decay in decays.items()}
        self._decays_any = not all(map(is_zero, self._decays.values()))
        self._looks = 0
        self._recorded = is_recorded((at.variables, *around.values.values()))
        around.tally.gradients += 1
        self._chunks: Chunks | None = None
        if chunks > 1:
            buffers = {**around.buffers, level.name: at.buffers}
            assert not self._recorded, "what is divided is not differentiated again"
            everything = {**around.values, level.name: at.variables}
            found, _, aftermath = partials(level, around.skeletons, everything, buffers, record, (level.name,))
            whole = connected(level, found.get(level.name))
            self._gradient = lambda: whole
            self._record = record.with_choices(aftermath.choices)
            self._chunks = Chunks(level, around, at, self._record, chunks, whole)
            return
        self._gradient, _, aftermath, self._pull = linearised(level, around, at, record)
        self._record = record.with_choices(aftermath.choices)

    @property
    def variables(self) -> Tree:
        """See `AbstractLinearisation`."""
        return self._at.variables

    @property
    def gradient(self) -> Tree:
        """What is linearised, with the decay, at the response: 0 at a solution."""
        return self._decayed(self._gradient(), self._at.variables)

    def hessian(self, direction: Tree) -> Tree:
        """See `AbstractLinearisation`."""
        name = self._level.name
        return self._decayed(self._product(direction, (name,)).get(name), direction)

    def pulled(self, direction: Tree) -> Upstream:
        """Hv under the name of the level itself, and `cross`, in one product."""
        name = self._level.name
        found = self._product(direction, (name, *self._around.live))
        return {**found, name: self._decayed(found.get(name), direction)}

    def _decayed(self, image: Tree | None, direction: Tree) -> Tree:
        """With what the L2 decay of the optimizer adds to `image`, which is None where f is linear in the variables."""
        if image is None:
            image = _tree.zeros(direction)
        if not self._decays_any:
            return image
        decays = [self._decays[key] for key in _tree.named(direction)]
        pairs = zip(_tree.leaves(image), _tree.leaves(direction), decays, strict=True)
        return _tree.rebuild(direction, [add(one, two, scale=decay) for one, two, decay in pairs])

    def cross(self, direction: Tree) -> Upstream:
        """See `AbstractLinearisation`."""
        return self._product(direction, self._around.live)

    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """See `AbstractLinearisation`."""
        if self._chunks is not None:
            return self._chunks.gradient_of_reads(variables)
        return gradient_of_reads(self._level, self._around, variables, self._at, self._record)

    def difference_of_reads(self, places: Iterable[Tree]) -> Upstream:
        """See `AbstractLinearisation`. What the objective shares is computed once, but for chunks."""
        if self._chunks is not None:
            return super().difference_of_reads(places)
        return difference_of_reads(self._level, self._around, places, self._at, self._record)

    def inverse(self, solve: Callable[[AbstractLinearisation, Tree], Tree], cotangent: Tree) -> Tree:
        """See `AbstractLinearisation`."""
        if not self._recorded:
            return solve(self, cotangent)
        everything = {**self._around.values, self._level.name: self._at.variables}
        names, inputs = recorded(everything)
        solution: Any = _Inverse.apply(self, solve, cotangent, names, *_tree.leaves(cotangent), *inputs)
        return _tree.rebuild(cotangent, solution)

    def regrouped(self, names: tuple[str, ...], tensors: Sequence[Tensor]) -> dict[str, Tree]:
        """`tensors`, in the order of `names`, as trees by name."""
        everything = {**self._around.values, self._level.name: self._at.variables}
        return regrouped({name: everything[name] for name in names}, tensors)

    def moved(self, values: Mapping[str, Tree]) -> Linearisation:
        """The same at other values, of the level itself and of those around it; only these are live."""
        own = values.get(self._level.name, self._at.variables)
        live = tuple(name for name in values if name != self._level.name)
        around = self._around._replace(values={**self._around.values, **values}, live=live)
        at = Position(own, self._at.buffers, self._at.optimizer)
        return Linearisation(self._level, around, at, self._record, self._last)

    def curvature(self, direction: Tree, cotangent: Tree, towards: Mapping[str, Tree]) -> Upstream:
        """(∂Hv/∂u)ᵀ λ at `towards`, for every level u in it. One gradient and two products."""

        def product(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
            return self.moved(moving).hessian(direction), ()

        _, _, pull = linearise(product, towards)
        self._around.tally.products += 1
        return pull(cotangent, tuple(towards))

    def dense_solve(self, cotangent: Tree, *, damping: float) -> Tree:
        """See `AbstractLinearisation`."""
        return dense_solution(self.hessian, cotangent, damping=damping)

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
        refuse_drawing(self._level.name)
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
        if inside_transform() or is_traced() or (flag.is_cuda and self._looks % LOOK_EVERY):
            return False
        return not bool(flag)

    def known(self, value: Tensor) -> float | None:
        """See `AbstractLinearisation`."""
        return known(value)

    def report(self, name: str, value: Tensor) -> None:
        """See `AbstractLinearisation`."""
        self._around.tally.reports.setdefault(self._pair, {})[name] = value.detach()

    @property
    def _pair(self) -> tuple[str, str]:
        """The upper level it is pulled back for, and the level."""
        if self._around.upper is not None:
            return self._around.upper, self._level.name
        pullbacks = self._around.tally.pullbacks
        return pullbacks[-1][0] if pullbacks else self._level.name, self._level.name

    def _product(self, direction: Tree, towards: tuple[str, ...]) -> Upstream:
        self._around.tally.products += 1
        if self._chunks is not None:
            self._around.tally.gradients += 1
            found = self._chunks.product(direction, towards)
            if self._chunks.difference is not None:
                self.report("chunk_difference", self._chunks.difference)
        else:
            found = self._pull(direction, towards, retain=True)
        return reduced_trees(found, self._record.batch, self._level.name)[0]


class _Inverse(torch.autograd.Function):
    """q = H⁻¹λ, differentiated by the same inverse: d(H⁻¹λ) = H⁻¹(dλ − dH · H⁻¹λ).

    Differentiating *through* a truncated series gives a Jacobian that is not symmetric; this one is. `backward` is made of
    recorded functions, so that it can be differentiated again, as often as a nest is deep.
    """

    @staticmethod
    def forward(
        ctx: Any, at: Linearisation, solve: Any, cotangent: Tree, names: tuple[str, ...], *tensors: Tensor
    ) -> Any:
        solution = [tensor.detach() for tensor in _tree.leaves(solve(at, _tree.detach(cotangent)))]
        ctx.at, ctx.solve, ctx.names, ctx.shapes = at, solve, names, cotangent
        ctx.save_for_backward(*solution, *tensors[len(solution) :])
        ctx.count = len(solution)
        return tuple(solution)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        saved, count = ctx.saved_tensors, ctx.count
        at: Linearisation = ctx.at
        solution = _tree.rebuild(ctx.shapes, saved[:count])
        towards = at.regrouped(ctx.names, saved[count:])
        if not torch.is_grad_enabled():
            towards = {name: _tree.detach(tree) for name, tree in towards.items()}
        pulled = at.moved(towards).inverse(ctx.solve, _tree.rebuild(ctx.shapes, weights))
        found = at.curvature(solution, pulled, towards)
        rest = [
            -leaf if name in found else None
            for name in ctx.names
            for leaf in _tree.leaves(found.get(name, towards[name]))
        ]
        return None, None, None, None, *_tree.leaves(pulled), *rest


def dense_solution(product: Callable[[Tree], Tree], cotangent: Tree, *, damping: float) -> Tree:
    """(A + damping · I)⁻¹ λ for the matrix A that `product` applies; not a number where that is singular."""
    vector = _flat(cotangent)
    eye = torch.eye(len(vector), dtype=vector.dtype, device=vector.device)
    columns = [_flat(product(_shaped(cotangent, row))) for row in eye]
    solution, failed = torch.linalg.solve_ex(torch.stack(columns, dim=1) + damping * eye, vector)
    return _shaped(cotangent, solution.where(failed == 0, float("nan")))


def _flat(tree: Tree) -> Tensor:
    """All entries in one vector, tensor after tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in _tree.leaves(tree)])


def _shaped(tree: Tree, vector: Tensor) -> Tree:
    """The entries of `vector` in the shape of `tree`."""
    tensors = _tree.leaves(tree)
    parts = vector.split([tensor.numel() for tensor in tensors])
    return _tree.rebuild(tree, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])

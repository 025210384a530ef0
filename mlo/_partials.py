"""First-order derivatives of a level's objective towards levels, reduced over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from mlo._autodiff import difference_of_gradients, gradients
from mlo._errors import UserError
from mlo._factored import gradients_as_factors
from mlo._objective import Aftermath, Record, evaluate, shares
from mlo._reduction import current_group, reduced_trees
from mlo._shared import Shared, difference, gradient_at_first

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._module import Skeleton
    from mlo._types import Tree, Upstream


def partials(
    level: Level,
    skeletons: Mapping[str, Skeleton],
    values: Mapping[str, Tree],
    buffers: Mapping[str, Mapping[str, Tensor]],
    record: Record,
    towards: tuple[str, ...],
    factored: str | None = None,
) -> tuple[Upstream, Tensor, Aftermath]:
    """∂f/∂(variables of each level in `towards`), the loss, and what the evaluation leaves. One first-order reverse pass.

    That of `factored` is left as factors where it can be; at the outermost level and in one process only.

    A level that the objective does not depend on is absent. Gradients, loss and measurements are reduced over processes:
    measurements of one number, that is; others are those of this process's part of the batch.
    """

    def objective(moving: Mapping[str, Tree]) -> tuple[Tensor, Aftermath]:
        return evaluate(level, skeletons, {**values, **moving}, buffers, record)

    at = {name: values[name] for name in towards}
    if factored is not None:
        return gradients_as_factors(objective, at, factored)
    found, loss, aftermath = gradients(objective, at)
    return _reduced(level, record, found, loss, aftermath)


def shared_partials(
    level: Level,
    skeletons: Mapping[str, Skeleton],
    values: Mapping[str, Tree],
    buffers: Mapping[str, Mapping[str, Tensor]],
    record: Record,
    live: tuple[str, ...],
) -> tuple[Upstream, Tensor, Aftermath, Shared]:
    """`partials` towards the level itself, and what it shares, ready for `difference_of_partials` towards `live`."""
    shared = Shared({name: values[name] for name in live}, values[level.name])
    found, loss, aftermath = gradient_at_first(_placed(level, skeletons, values, buffers, record), shared)
    return *_reduced(level, record, {level.name: found[""]} if found else {}, loss, aftermath), shared


def difference_of_partials(
    level: Level,
    skeletons: Mapping[str, Skeleton],
    values: Mapping[str, Tree],
    buffers: Mapping[str, Mapping[str, Tensor]],
    record: Record,
    towards: tuple[str, ...],
    places: Iterable[Tree],
    shared: Shared | None = None,
) -> Upstream:
    """∂f/∂(variables of each level in `towards`) with the level itself at the first of two places, less at the second.

    What its objective shares is computed once: here, or where `shared` comes from. Reduced over processes, as `partials`.
    Raises `UserError` where what it shares depends on the level's own variables.
    """
    if not shares(level):

        def objective(moving: Mapping[str, Tree], own: Tree) -> tuple[Tensor, Aftermath]:
            return evaluate(level, skeletons, {**values, **moving, level.name: own}, buffers, record)

        found = difference_of_gradients(objective, {name: values[name] for name in towards}, places)
        return reduced_trees(found, record.batch, level.name)[0]
    above, below = places
    if shared is None:
        shared = Shared({name: values[name] for name in towards}, above)
        above = shared.first
    found, depends = difference(_placed(level, skeletons, values, buffers, record), shared, above, below)
    if depends:
        raise UserError(
            f"what the objective of level '{level.name}' computes by `values.shared` depends on the level's own variables: "
            f"leave values['{level.name}'] out of it"
        )
    return reduced_trees(found, record.batch, level.name)[0]


def _placed(
    level: Level,
    skeletons: Mapping[str, Skeleton],
    values: Mapping[str, Tree],
    buffers: Mapping[str, Mapping[str, Tensor]],
    record: Record,
) -> Callable[[Mapping[str, Tree], Tree, Shared], tuple[Tensor, Aftermath]]:
    """The objective of `level` at values that move, and at a place of its own."""

    def objective(moving: Mapping[str, Tree], own: Tree, shared: Shared) -> tuple[Tensor, Aftermath]:
        return evaluate(level, skeletons, {**values, **moving, level.name: own}, buffers, record, shared)

    return objective


def _reduced(
    level: Level, record: Record, found: Upstream, loss: Tensor, aftermath: Aftermath
) -> tuple[Upstream, Tensor, Aftermath]:
    """The same over all processes that share the batch."""
    if current_group() is None:
        return found, loss, aftermath
    means = {key: value for key, value in aftermath.measured.items() if not value.dim() and value.is_floating_point()}
    found, (loss, *reduced) = reduced_trees(found, record.batch, level.name, [loss, *means.values()])
    return found, loss, aftermath._replace(measured={**aftermath.measured, **dict(zip(means, reduced, strict=True))})

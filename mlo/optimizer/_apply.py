"""Take one step with an optimizer as it is at an iteration: schedules, clipping, groups, what is read from levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, TypeVar

from mlo import _tree
from mlo._patterns import assigned
from mlo.optimizer._abstract import AbstractOptimizer, OptimizerState, member, plain
from mlo.optimizer._read import Option, Read, tensors_read
from mlo.optimizer._root import root
from mlo.schedule._abstract import AbstractSchedule

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree
    from mlo.optimizer._arithmetic import Setting

Some = TypeVar("Some", bound=AbstractOptimizer)

_PLAIN = frozenset({float, int, bool, type(None)})
"""The types of options that are neither schedules nor read. Asking whether an option is one of these is slow."""


def initial(optimizer: AbstractOptimizer, parameters: Tree) -> OptimizerState:
    """The state before the first update."""
    if not optimizer.groups:
        return optimizer.init(parameters)
    parts = _members(optimizer, parameters)
    return OptimizerState(moments=_joined([part.init(_only(parameters, names)).moments for part, names in parts]))


def updated(
    optimizer: AbstractOptimizer,
    iteration: int,
    gradient: Tree,
    state: OptimizerState,
    parameters: Tree,
    read: Mapping[str, Tree] | None = None,
) -> tuple[Tree, OptimizerState]:
    """New parameters and new state, by `optimizer` as it is at `iteration`, which counts from 1.

    `read` holds the constrained values of the levels that its options are read from. The gradient is clipped before anything
    else, as by those who call `torch.nn.utils.clip_grad_value_` and then `clip_grad_norm_` before a step of `torch.optim`;
    weight decay is added to what is left of it. Differentiable in all trees. Where an optimizer has neither schedules nor
    clipping nor groups and reads nothing, this is its `update`.
    """
    if _is_plain(optimizer) and optimizer.clip_value is None and optimizer.clip_norm is None:
        return optimizer.update(gradient, state, parameters)
    now = at(optimizer, iteration)
    if now.clip_value is not None:
        gradient = _cut(gradient, _one(now.clip_value, read))
    if now.clip_norm is not None:
        gradient = _shortened(gradient, _one(now.clip_norm, read))
    if not optimizer.groups and not any(isinstance(option, Read) for option in vars(now).values()):
        return now.update(gradient, state, parameters)
    parts = list(_parts(optimizer if optimizer.groups else now, parameters, read))
    if not optimizer.groups and len(parts) == 1:
        return parts[0][0].update(gradient, state, parameters)
    moved: dict[str, Tensor] = {}
    moments: list[Mapping[str, Tree]] = []
    for part, names in parts:
        before = {key: own for key, moment in state.moments.items() if (own := _only(moment, names))}
        now = at(part, iteration)
        new, after = now.update(_only(gradient, names), OptimizerState(state.count, before), _only(parameters, names))
        moved |= _tree.named(new)
        moments.append(after.moments)
    tensors = [moved[name] for name in _tree.named(parameters)]
    return _tree.rebuild(parameters, tensors), OptimizerState(state.count + 1, _joined(moments))


def at(optimizer: Some, iteration: int) -> Some:
    """`optimizer` with the numbers that its schedules give at `iteration`; itself if it has none."""
    if _is_plain(optimizer):
        return optimizer
    numbers = {
        name: option(iteration) for name, option in vars(optimizer).items() if isinstance(option, AbstractSchedule)
    }
    return _with(optimizer, numbers)


def _is_plain(optimizer: AbstractOptimizer) -> bool:
    """Whether it has neither schedules nor groups and reads nothing: it is the same at every iteration."""
    return _PLAIN.issuperset(map(type, vars(optimizer).values()))


def l2_decays(
    optimizer: AbstractOptimizer, iteration: int, parameters: Tree, read: Mapping[str, Tree] | None = None
) -> dict[str, Setting | None]:
    """By the name of a parameter ('' for a single tensor), the d of `AbstractOptimizer.l2_decay` at `iteration`."""
    found: dict[str, Setting | None] = {}
    for part, names in _parts(optimizer, parameters, read):
        decay = part.l2_decay
        now = decay(iteration) if isinstance(decay, AbstractSchedule) else decay
        found |= dict.fromkeys(names, None if now is None else plain(now))
    return found


def is_decoupled(optimizer: AbstractOptimizer) -> bool:
    """Whether some parameters decay in a way that belongs to no objective."""
    return any(member(optimizer, pattern).l2_decay is None for pattern in ("", *(optimizer.groups or ())))


def _cut(gradient: Tree, size: Setting) -> Tree:
    return _tree.apply(lambda tensor: tensor.clamp(-size, size), gradient)


def _shortened(gradient: Tree, length: Setting) -> Tree:
    """With the 1e-6 in the denominator that torch has there."""
    norm = root(_tree.inner(gradient, gradient))
    return _tree.scale(gradient, by=(length / (norm + 1e-6)).clamp(max=1.0))


def _parts(
    optimizer: AbstractOptimizer, parameters: Tree, read: Mapping[str, Tree] | None
) -> Iterator[tuple[AbstractOptimizer, tuple[str, ...]]]:
    """Optimizers with the tensors that they read, and the parameters of each: those of a group, or one by itself."""
    for part, names in _members(optimizer, parameters):
        options = {name: option for name, option in vars(part).items() if isinstance(option, Read)}
        found = {name: tensors_read(option, read, names) for name, option in options.items()}
        if all(len({id(tensor) for tensor in tensors.values()}) == 1 for tensors in found.values()):
            yield _with(part, {name: next(iter(tensors.values())) for name, tensors in found.items()}), names
        else:
            for own in names:
                yield _with(part, {name: tensors[own] for name, tensors in found.items()}), (own,)


def _members(optimizer: AbstractOptimizer, parameters: Tree) -> Iterator[tuple[AbstractOptimizer, tuple[str, ...]]]:
    """The optimizers of the groups, and the names each has won."""
    if not optimizer.groups:
        yield optimizer, tuple(_tree.named(parameters))
        return
    for pattern, names in assigned(tuple(optimizer.groups), tuple(_tree.named(parameters))).items():
        yield member(optimizer, pattern), names


def _one(option: Option, read: Mapping[str, Tree] | None) -> Setting:
    return tensors_read(option, read, ("",))[""] if isinstance(option, Read) else plain(option)


def _with(optimizer: Some, options: Mapping[str, object]) -> Some:
    """`optimizer` with other options; itself if there are none."""
    if not options:
        return optimizer
    changed = copy(optimizer)
    for name, option in options.items():  # not through the constructor: a learning rate may have come down to 0
        object.__setattr__(changed, name, option)
    return changed


def _only(tree: Tree, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of `tree` that are called so; a moment need not have them all."""
    named = _tree.named(tree)
    return {name: named[name] for name in names if name in named}


def _joined(moments: Sequence[Mapping[str, Tree]]) -> dict[str, Tree]:
    """The moments of all groups, by the name of the moment and then of the parameter."""
    keys = dict.fromkeys(key for some in moments for key in some)
    return {
        key: {name: t for some in moments if key in some for name, t in _tree.named(some[key]).items()} for key in keys
    }

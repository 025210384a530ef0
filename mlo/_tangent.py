"""Carry the derivative of a level's steps along while they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _tree
from mlo._autodiff import linearise, pushforward
from mlo._objective import evaluate, options_of
from mlo._reading import reads_live
from mlo._reduction import reduced_trees
from mlo._step import Position, Step, Surroundings, joined, regrouped
from mlo.optimizer import OptimizerState, updated

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream


@final
@dataclass(frozen=True, eq=False)
class Tangent:
    """The derivative of variables and moments in one number that is read: `direction` is 1 there and 0 elsewhere."""

    direction: Upstream
    variables: Tree
    moments: Upstream


def at_rest(at: Position, around: Surroundings) -> list[Tangent]:
    """The tangents before the first step: the start is held fixed."""
    still = _tree.zeros(at.variables)
    moments = {key: _tree.zeros(moment) for key, moment in at.optimizer.moments.items()}
    return [Tangent(direction, still, moments) for direction in units({n: around.values[n] for n in around.live})]


def advanced(step: Step, tangents: list[Tangent]) -> list[Tangent]:
    """The tangents after `step`, linearised where it started. One gradient, and one product for each of them."""
    level, around, optimizer = step.level, step.around, step.level.optimizer
    assert optimizer is not None
    around.tally.gradients += 1
    buffers = {**around.buffers, level.name: step.at.buffers}
    live = {name: around.values[name] for name in around.live}

    def both(moving: Mapping[str, Tree]) -> tuple[Tree, tuple[()]]:
        """∂f/∂w and ∂f/∂u: the derivative of the second in w is that of the first in u, transposed."""

        def objective(everything: Mapping[str, Tree]) -> tuple[Tensor, Any]:
            return evaluate(level, around.skeletons, {**around.values, **everything}, buffers, step.record)

        value, _, pull = linearise(objective, {**live, **moving})
        assert isinstance(value, torch.Tensor)
        found = pull(torch.ones_like(value), (level.name, *live))
        return joined({name: found.get(name, _tree.zeros(tree)) for name, tree in {**moving, **live}.items()}), ()

    _, _, pull = linearise(both, {level.name: step.start})
    before = step.at.optimizer
    read = {name: live[name] for name in {option.level for _, option in reads_live(optimizer, live)}}

    def update(moving: Mapping[str, Tree]) -> Tree:
        state = OptimizerState(before.count, {key: moving[_MOMENT + key] for key in before.moments})
        options = options_of(level, around.skeletons, {**around.values, **{name: moving[name] for name in read}})
        own = moving[_VARIABLES]
        after, remembered = updated(optimizer, step.record.iteration, moving[_GRADIENT], state, own, options)
        return joined({_VARIABLES: after, **{_MOMENT + key: moment for key, moment in remembered.moments.items()}})

    stood: dict[str, Tree] = {_MOMENT + key: moment for key, moment in before.moments.items()}
    assert step.gradient is not None
    push = pushforward(update, {_GRADIENT: step.gradient, _VARIABLES: step.start, **stood, **read})
    shapes: dict[str, Tree] = {_VARIABLES: step.start, **stood}
    found: list[Tangent] = []
    for tangent in tangents:
        around.tally.products += 1
        weights = joined({level.name: tangent.variables, **tangent.direction})
        pulled = pull(weights, (level.name,), retain=True)
        turn = reduced_trees(pulled, step.record.batch, level.name)[0].get(level.name)
        gradient = _tree.zeros(step.start) if turn is None else turn
        moments = {_MOMENT + key: moment for key, moment in tangent.moments.items()}
        turns = {name: tangent.direction[name] for name in read}
        pushed = push({_GRADIENT: gradient, _VARIABLES: tangent.variables, **moments, **turns})
        trees = regrouped(shapes, _tree.leaves(pushed))
        found.append(
            Tangent(tangent.direction, trees[_VARIABLES], {key: trees[_MOMENT + key] for key in before.moments})
        )
    return found


_GRADIENT, _VARIABLES, _MOMENT = "::gradient", "::variables", ":"
"""Level names are identifiers."""


def contracted(tangents: list[Tangent], cotangent: Tree) -> Upstream:
    """(∂w*/∂u)ᵀ λ: the inner product of λ with each tangent, where its direction points."""
    total: dict[str, Tree] = {}
    for tangent in tangents:
        slope = _tree.inner(cotangent, tangent.variables)
        for name, tree in tangent.direction.items():
            part = _tree.scale(tree, by=slope)
            total[name] = _tree.add(total[name], part) if name in total else part
    return total


def units(trees: Upstream) -> list[Upstream]:
    """For every number in `trees`, trees like them that are 1 there and 0 elsewhere."""
    found: list[Upstream] = []
    for name, tree in trees.items():
        for key, tensor in _tree.named(tree).items():
            for index in range(tensor.numel()):
                unit = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
                unit[index] = 1
                placed = {
                    other: unit.view(tensor.shape) if other == key else torch.zeros_like(part)
                    for other, part in _tree.named(tree).items()
                }
                own = _tree.rebuild(tree, placed.values())
                found.append({each: own if each == name else _tree.zeros(part) for each, part in trees.items()})
    return found

"""Every derivative of the engine; those at several places at once are in `_shared`.

At the outermost level a derivative is plain autograd on detached leaves: it is the same derivative as `torch.func`'s and
costs 6 % over a hand-written backward pass where a transform costs 21 %. Inside a transform of the user's (`vmap` over
seeds, say) leaves cannot be made, and `torch.func.vjp` takes over. `torch.func.grad` is never used: it always builds the
graph of a second derivative.

Plain autograd also knows which inputs an output does not depend on; a transform answers zeros there. Levels that a
hypergradient cannot reach are therefore found outside transforms only.

A derivative that is taken while it is itself being recorded, as those below a nested level are, stays a function of the
tensors it was taken at: see `is_recorded`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.autograd import Variable
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function

from mlo import _tree
from mlo._errors import GraphError, Mistake
from mlo._modes import PlainAttention, Recording, inside_transform, is_traced

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream

After = TypeVar("After")

_REQUIRES_GRAD, _SHAPE = attrgetter("requires_grad"), attrgetter("shape")
_DETACH, _MAKE_LEAF = torch.Tensor.detach, torch.Tensor.requires_grad_
_run_backward: Callable[..., Sequence[Tensor | None]] = cast("Any", Variable)._execution_engine.run_backward


def refuse_drawing(level: str) -> None:
    """Raise if numbers that the method of `level` draws would be the same in every iteration to come."""
    if is_traced():
        reason = "it draws random numbers, which compiled steps would hold fixed"
        raise GraphError([Mistake(level, "hypergradient", reason)])


def is_recorded(trees: Iterable[Tree]) -> bool:
    """Whether what is computed from `trees` here and now will be differentiated again: they have a history, and it is on.

    The outermost call of the engine turns recording off, `linearise` and `recorded_gradient` turn it on for what they
    evaluate: a derivative taken inside of them is one of those.
    """
    if not torch.is_grad_enabled() or inside_transform():
        return False
    return any(tensor.requires_grad for tree in trees for tensor in _tree.leaves(tree))


def linearise(
    function: Callable[[Mapping[str, Tree]], tuple[Tree, After]], at: Mapping[str, Tree]
) -> tuple[Tree, After, Callable[..., Upstream]]:
    """`function` at `at`, what else it returned, and its pullback.

    `function(at)` gives a tree and a further value made of tensors, which is not differentiated. The pullback
    `pull(cotangent, names, retain=False)` gives (∂function/∂at[name])ᵀ cotangent for each of `names` that the result
    depends on; it can be called again only after `retain=True`. One reverse pass a call. Where `at` has a history that is
    being recorded, the result and what the pullback gives are recorded functions of it.
    """
    if inside_transform():
        return _linearise_by_transform(function, at)
    if is_recorded(at.values()):
        return _linearise_recorded(function, at)
    leaves, _ = leaves_of(at)
    with Recording():
        result, after = function(leaves)

    def pull(cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
        return pulled(result, cotangent, {name: leaves[name] for name in names}, retain=retain, again=False)

    return _tree.detach(result), after, pull


def _linearise_recorded(
    function: Callable[[Mapping[str, Tree]], tuple[Tree, After]], at: Mapping[str, Tree]
) -> tuple[Tree, After, Callable[..., Upstream]]:
    """Partial derivatives are taken at aliases, so that none runs through the history of another argument."""
    points = {name: _tree.apply(_alias, tree) for name, tree in at.items()}
    with Recording(), PlainAttention():
        result, after = function(points)

    def pull(cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
        wanted = {name: points[name] for name in names}
        return pulled(result, cotangent, wanted, retain=True, again=torch.is_grad_enabled())

    return result, after, pull


def pulled(
    result: Tree, cotangent: Tree, wanted: Mapping[str, Tree], *, retain: bool, again: bool
) -> Mapping[str, Tree]:
    """(∂result/∂wanted)ᵀ cotangent, by name; to be differentiated `again`, or not."""
    outputs, weights = _tree.leaves(result), _tree.leaves(cotangent)
    if len(outputs) != len(weights):
        raise ValueError(f"a cotangent of {len(weights)} tensors on a result of {len(outputs)}")
    if not all(map(_REQUIRES_GRAD, outputs)):
        tracked = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
        outputs, weights = [output for output, _ in tracked], [weight for _, weight in tracked]
    inputs: list[Tensor] = []
    for tree in wanted.values():
        inputs += _tree.leaves(tree)
    if not outputs or not inputs:
        return {}
    return grouped(wanted, reverse_pass(outputs, inputs, weights, retain=retain, again=again))


def reverse_pass(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], *, retain: bool, again: bool
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` without its checks, which cost as much as the reverse pass of a small operation each, nor its
    log of nodes for those who debug torch.

    Where they have something to find, a shape that does not fit or a tensor that is not torch's own, they are made.
    """
    outputs, inputs, weights = tuple(outputs), tuple(inputs), tuple(weights)
    fits = list(map(_SHAPE, outputs)) == list(map(_SHAPE, weights))
    if fits and not (has_torch_function((*outputs, *inputs)) or is_dynamo_compiling()):
        return _run_backward(outputs, weights, retain, again, inputs, True, accumulate_grad=False)
    return torch.autograd.grad(outputs, inputs, weights, retain_graph=retain, create_graph=again, allow_unused=True)


def pushforward(
    function: Callable[[Mapping[str, Tree]], Tree], at: Mapping[str, Tree]
) -> Callable[[Mapping[str, Tree]], Tree]:
    """From tangents by name, like `at`, to (∂function/∂at) tangent: the transpose of the pullback, itself linear.

    By reverse passes only, so it is right wherever these are. For functions that cost little, such as an update.
    """
    if inside_transform():
        result, pull_all = cast("Any", torch.func.vjp(function, dict(at)))
        _, push = cast("Any", torch.func.vjp(lambda weights: pull_all(weights)[0], _tree.zeros(result)))
        pushed: Any = push
        return lambda tangents: pushed(dict(tangents))[0]
    leaves, tensors = leaves_of(at)
    with Recording():
        result = function(leaves)
        outputs = _tree.leaves(result)
        weights = [torch.zeros_like(output).requires_grad_() for output in outputs]
        pulled: Any = torch.autograd.grad(outputs, tensors, weights, create_graph=True, allow_unused=True)

    def push(tangents: Mapping[str, Tree]) -> Tree:
        turns = [turn for name in leaves for turn in _tree.leaves(tangents[name])]
        used = [(image, turn) for image, turn in zip(pulled, turns, strict=True) if image is not None]
        images, given = zip(*used, strict=True)
        found: Any = torch.autograd.grad(images, weights, given, retain_graph=True, allow_unused=True)
        pairs = zip(found, outputs, strict=True)
        return _tree.rebuild(result, [torch.zeros_like(output) if t is None else t for t, output in pairs])

    return push


def gradients(
    function: Callable[[Mapping[str, Tree]], tuple[Tensor, After]], at: Mapping[str, Tree]
) -> tuple[Upstream, Tensor, After]:
    """∂function/∂at[name] for every name that the number `function(at)` depends on, that number, and what else it returned.

    `linearise` and its pullback of 1 in one, without what several pullbacks would need. One reverse pass.
    """
    if inside_transform():
        value, after, pull = _linearise_by_transform(function, at)
        assert isinstance(value, torch.Tensor)
        return pull(torch.ones_like(value), at), value, after
    if is_recorded(at.values()):
        value, after, pull = _linearise_recorded(function, at)
        assert isinstance(value, torch.Tensor)
        return pull(torch.ones_like(value), at), value, after
    leaves, inputs = leaves_of(at)
    with Recording():
        value, after = function(leaves)
    if not value.requires_grad or not inputs:
        return {}, value.detach(), after
    found = reverse_pass((value,), inputs, (torch.ones_like(value),), retain=False, again=False)
    return grouped(leaves, found), value.detach(), after


def difference_of_gradients(
    function: Callable[[Mapping[str, Tree], Tree], tuple[Tensor, Any]], at: Mapping[str, Tree], places: Iterable[Tree]
) -> Upstream:
    """∂function(at, place)/∂at[name] at the first of two places less that at the second, for names that either depends on.

    One reverse pass for each place. The second is asked for when the first is let go of, so that it finds its memory in the
    cache. At the outermost level only: not inside a transform, and not where `at` or the places are recorded.
    """
    leaves: Mapping[str, Tree] = at
    found: list[Sequence[Tensor | None]] = []
    for place in places:
        leaves, inputs = leaves_of(at)  # others for each: an objective may leave hooks on them
        with Recording():
            value, _ = function(leaves, place)
        used = value.requires_grad and inputs
        weights = (torch.ones_like(value),)
        found.append(
            reverse_pass((value,), inputs, weights, retain=False, again=False) if used else [None] * len(inputs)
        )
        del value, place  # and its graph, before there is another
    return grouped(leaves, list(map(_less, *found)))


def _less(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    """one − two, where None is zero."""
    if one is None or two is None:
        return one if two is None else -two
    return one - two


def recorded_gradient(function: Callable[[Tree], tuple[Tensor, After]], at: Tree) -> tuple[Tree | None, Tensor, After]:
    """∇function at `at`, as a differentiable function of all that `function` reads; None if it does not depend on `at`.

    Also gives the value and what else `function` returned. Attention uses the one kernel that has a second derivative on
    every device.
    """
    if inside_transform():
        value, pull, after = _vjp(function, at)
        return pull(torch.ones_like(value))[0], value, after
    point = _tree.apply(_leaf, at)
    with Recording(), PlainAttention():
        value, after = function(point)
        if not value.requires_grad:
            return None, value, after
        one = torch.ones_like(value)
        found = reverse_pass((value,), _tree.leaves(point), (one,), retain=True, again=True)
    return grouped({"": point}, found).get(""), value, after


def gradient_with_pullback(
    function: Callable[[Mapping[str, Tree]], tuple[Tensor, After]], at: Mapping[str, Tree], own: str
) -> tuple[Tree | None, Tensor, After, Callable[..., Upstream]]:
    """∂function/∂at[own], the value, what else `function` returned, and the pullback of that gradient: see `linearise`.

    `linearise` of `recorded_gradient`, at the outermost level only: not inside a transform, and not where `at` is recorded.
    The gradient is None where `function` does not depend on `at[own]`.
    """
    leaves, _ = leaves_of(at)
    with Recording(), PlainAttention():
        value, after = function(leaves)
        gradient, pull = gradient_of(value, leaves, own)
    return gradient, value.detach(), after, pull


def gradient_of(value: Tensor, leaves: Mapping[str, Tree], own: str) -> tuple[Tree | None, Callable[..., Upstream]]:
    """∂value/∂leaves[own] and its pullback, of a value that was recorded as a function of `leaves`. Where it is recorded."""
    gradient: Tree | None = None
    if value.requires_grad:
        place = leaves[own]
        one = (torch.ones_like(value),)
        found = reverse_pass((value,), _tree.leaves(place), one, retain=True, again=True)
        gradient = grouped({own: place}, found).get(own)

    def pull(cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
        assert gradient is not None, "there is no gradient"
        return pulled(gradient, cotangent, {name: leaves[name] for name in names}, retain=retain, again=False)

    return None if gradient is None else _tree.detach(gradient), pull


def _linearise_by_transform(
    function: Callable[[Mapping[str, Tree]], tuple[Tree, After]], at: Mapping[str, Tree]
) -> tuple[Tree, After, Callable[..., Upstream]]:
    result, pull_all, after = _vjp(function, dict(at))

    def pull(cotangent: Tree, names: Iterable[str], *, retain: bool = True) -> Upstream:
        (found,) = pull_all(cotangent)
        return {name: found[name] for name in names}

    return result, after, pull


def _vjp(function: Callable[[Any], tuple[Any, After]], at: Any) -> tuple[Any, Callable[[Any], tuple[Any]], After]:
    with PlainAttention():  # the other kernels have no batching rule
        return cast("Any", torch.func.vjp(function, at, has_aux=True))


def leaf_of(tensor: Tensor) -> Tensor:
    """The same numbers, as a leaf to differentiate towards."""
    return tensor.detach().requires_grad_()


def _leaf(tensor: Tensor) -> Tensor:
    """`leaf_of` what has no history and is no leaf yet; everything else as it is."""
    return tensor if tensor.requires_grad else leaf_of(tensor)


def leaves_of(trees: Mapping[str, Tree]) -> tuple[Mapping[str, Tree], list[Tensor]]:
    """`trees` made of leaves, and these one after the other."""
    places: dict[str, Tree] = {}
    leaves: list[Tensor] = []
    for name, tree in trees.items():
        if isinstance(tree, (dict, Mapping)):
            places[name] = own = dict(zip(tree, map(_MAKE_LEAF, map(_DETACH, tree.values())), strict=True))
            leaves += own.values()
        else:
            places[name] = leaf = leaf_of(tree)
            leaves.append(leaf)
    return places, leaves


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else leaf_of(tensor)


def grouped(wanted: Mapping[str, Tree], found: Sequence[Tensor | None]) -> Upstream:
    """`found`, which follows the leaves of `wanted`, as trees by name; a tree none of whose leaves is used is left out."""
    by_name: dict[str, Tree] = {}
    begin = 0
    for name, tree in wanted.items():
        if not isinstance(tree, (dict, Mapping)):
            part = found[begin]
            begin += 1
            if part is not None:
                by_name[name] = part
            continue
        own = found[begin : begin + len(tree)]
        begin += len(tree)
        kinds = set(map(type, own))
        if NoneType not in kinds:
            if own:
                by_name[name] = dict(zip(tree, own, strict=True))  # pyright: ignore[reportArgumentType]
        elif len(kinds) > 1:
            pairs = zip(tree.items(), own, strict=True)
            by_name[name] = {key: torch.zeros_like(leaf) if part is None else part for (key, leaf), part in pairs}
    return by_name

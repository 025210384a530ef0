"""Derivatives of a function at several places, with parts that its evaluations have in common computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, final

import torch

from mlo import _tree
from mlo._autodiff import grouped, leaf_of, leaves_of, reverse_pass
from mlo._modes import Recording

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream

After = TypeVar("After")


class Evaluation(NamedTuple):
    """What one evaluation sees: `places` made of `leaves`, and leaves in place of what is shared, each with its number."""

    places: Mapping[str, Tree]
    leaves: list[Tensor]
    stand_ins: list[tuple[int, Tensor]]


@final
class Shared:
    """Parts that evaluations of a function at several places have in common: computed by the first of them, and kept.

    - `first`: the place of the evaluation that computes the parts, which they must not depend on.
    - `used`: whether they were pulled back, and their history is gone.
    - `tensors`: those of the parts that have a history, one part after the other: a part may be made of earlier ones.

    Every evaluation sees leaves of its own in place of what it is differentiated towards, and of `tensors`, so that what
    arrives there is gathered before it is pulled any further: an objective may leave hooks on what it is given.
    """

    def __init__(self, towards: Mapping[str, Tree], first: Tree) -> None:
        self.first: Tree = _tree.apply(leaf_of, first)
        self.tensors: list[Tensor] = []
        self.used = False
        self._towards = towards
        self._begun: list[Evaluation] = []
        self._parts: dict[str, tuple[Tree, int]] = {}
        self._ends: list[int] = []

    def begin(self) -> Evaluation:
        """What the next evaluation sees."""
        self._begun.append(Evaluation(*leaves_of(self._towards), []))
        return self._begun[-1]

    def __call__(self, name: str, compute: Callable[[], Tree]) -> Tree:
        """What `compute` gave when this name was asked for first."""
        if name not in self._parts:
            part = compute()
            self._parts[name] = part, len(self.tensors)
            self.tensors += [tensor for tensor in _tree.leaves(part) if tensor.requires_grad]
            self._ends.append(len(self.tensors))
        part, begin = self._parts[name]
        place, stand_ins = count(begin), self._begun[-1].stand_ins

        def stand_in(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            stand_ins.append((next(place), leaf_of(tensor)))
            return stand_ins[-1][1]

        return _tree.apply(stand_in, part)

    def pulled(self, gathered: Sequence[Tensor | None]) -> tuple[list[Tensor | None], bool]:
        """What is `gathered` at `tensors`, pulled back to what the function is differentiated towards; and whether a part
        depends on `first`.

        The last part first: what arrives at a part is complete once all later ones are pulled. Their history is gone then.
        """
        leaves = [leaf for begun in self._begun for leaf in begun.leaves]
        inputs = [*leaves, *_tree.leaves(self.first)]
        arrived = list(gathered)
        total: list[Tensor | None] = [None] * len(leaves)
        for begin, end in reversed(list(pairwise((0, *self._ends)))):
            known = [(self.tensors[at], weight) for at in range(begin, end) if (weight := arrived[at]) is not None]
            if not known:
                continue
            outputs, weights = zip(*known, strict=True)
            earlier = [(at, leaf) for begun in self._begun for at, leaf in begun.stand_ins if at < begin]
            try:
                everything = [*inputs, *(leaf for _, leaf in earlier)]
                found = reverse_pass(outputs, everything, weights, retain=begin > 0, again=False)
            except RuntimeError:  # what the level's own derivative ran through has no history any more
                if _reaches(outputs, _tree.leaves(self.first)):
                    return [], True
                raise
            if any(each is not None for each in found[len(leaves) : len(inputs)]):
                return [], True
            total = _sums(total, found[: len(leaves)])
            for (at, _), weight in zip(earlier, found[len(inputs) :], strict=True):
                (arrived[at],) = _sums([arrived[at]], [weight])
        rest = iter(total)
        return reduce(_sums, [[next(rest) for _ in begun.leaves] for begun in self._begun]), False


def gradient_at_first(
    function: Callable[[Mapping[str, Tree], Tree, Shared], tuple[Tensor, After]], shared: Shared
) -> tuple[Upstream, Tensor, After]:
    """∇function at `shared.first` by the name "", or nothing; its value, and what else it returned: as `gradients` gives it.

    What the function shares is computed, with its history, and kept.
    """
    with Recording():
        value, after = function(shared.begin().places, shared.first, shared)
    if not value.requires_grad:
        return {}, value.detach(), after
    inputs = _tree.leaves(shared.first)
    found = reverse_pass((value,), inputs, (torch.ones_like(value),), retain=False, again=False)
    return grouped({"": shared.first}, found), value.detach(), after


def difference(
    function: Callable[[Mapping[str, Tree], Tree, Shared], tuple[Tensor, Any]],
    shared: Shared,
    above: Tree,
    below: Tree,
) -> tuple[Upstream, bool]:
    """∂function/∂leaves at the place `above`, less that at `below`, for the leaves that it depends on.

    What the function shares is pulled back once, linear as that is in what arrives. Two reverse passes and one through
    what is shared, whose history is gone then. Not inside a transform. Also gives whether that depends on `shared.first`.
    """
    fresh, shared.used = not shared.tensors, True
    places: Mapping[str, Tree] = {}
    direct: list[Tensor | None] = []
    gathered: list[Tensor | None] = []
    with Recording():
        for place, sign in ((above, 1.0), (below, -1.0)):
            places, leaves, stand_ins = shared.begin()
            value, _ = function(places, place, shared)
            direct = direct or [None] * len(leaves)
            gathered += [None] * (len(shared.tensors) - len(gathered))
            everything = [*leaves, *(leaf for _, leaf in stand_ins)]
            if value.requires_grad and everything:
                weight = torch.full_like(value, sign)
                # What was shared just now may have history in common with the value.
                retain = fresh and place is above and bool(shared.tensors)
                found = reverse_pass((value,), everything, (weight,), retain=retain, again=False)
                direct = _sums(direct, found[: len(leaves)])
                for (at, _), arrived in zip(stand_ins, found[len(leaves) :], strict=True):
                    (gathered[at],) = _sums([gathered[at]], [arrived])
            del value
    pulled, depends = shared.pulled(gathered)
    return grouped(places, _sums(direct, pulled)) if not depends else {}, depends


def _sums(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(some, others, strict=True)
    return [one if other is None else other if one is None else one + other for one, other in pairs]


def _reaches(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether one of `inputs`, which are leaves, is in the history of `outputs`."""
    wanted, seen = {id(tensor) for tensor in inputs}, set[Any]()
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False

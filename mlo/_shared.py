"""Derivatives of a function at several places, with parts that its evaluations have in common computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch

from mlo import _tree
from mlo._autodiff import grouped, leaf_of, reverse_pass
from mlo._modes import Recording

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream

After = TypeVar("After")


@final
class Shared:
    """Parts that evaluations of a function at several places have in common: computed by the first of them, and kept.

    - `leaves`: what the function is differentiated towards, in every evaluation.
    - `first`: the place of the evaluation that computes the parts, which they must not depend on.
    - `used`: whether they were pulled back, and their history is gone.
    - `pairs`: their tensors that have a history, each with the leaf that evaluations see in its place, so that what
      arrives there is gathered before it is pulled any further. One part after the other: a part may be made of the leaves
      of earlier ones.
    """

    def __init__(self, towards: Mapping[str, Tree], first: Tree) -> None:
        self.leaves: Mapping[str, Tree] = {name: _tree.apply(leaf_of, tree) for name, tree in towards.items()}
        self.first: Tree = _tree.apply(leaf_of, first)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.used = False
        self._seen: dict[str, Tree] = {}
        self._ends: list[int] = []

    def __call__(self, name: str, compute: Callable[[], Tree]) -> Tree:
        """What `compute` gave when this name was asked for first."""
        if name not in self._seen:
            self._seen[name] = _tree.apply(self._stand_in, compute())
            self._ends.append(len(self.pairs))
        return self._seen[name]

    def pulled(self, gathered: Sequence[Tensor | None]) -> tuple[list[Tensor | None], bool]:
        """What is `gathered` at the leaves of `pairs`, pulled back to `leaves`; and whether a part depends on `first`.

        The last part first: what arrives at a part is complete once all later ones are pulled. Their history is gone then.
        """
        leaves = [leaf for tree in self.leaves.values() for leaf in _tree.leaves(tree)]
        inputs = [*leaves, *_tree.leaves(self.first)]
        arrived = list(gathered)
        total: list[Tensor | None] = [None] * len(leaves)
        for begin, end in reversed(list(pairwise((0, *self._ends)))):
            known = [(self.pairs[at][0], weight) for at in range(begin, end) if (weight := arrived[at]) is not None]
            if not known:
                continue
            outputs, weights = zip(*known, strict=True)
            earlier = [leaf for _, leaf in self.pairs[:begin]]
            try:
                found = reverse_pass(outputs, [*inputs, *earlier], weights, retain=begin > 0, again=False)
            except RuntimeError:  # what the level's own derivative ran through has no history any more
                if _reaches(outputs, _tree.leaves(self.first)):
                    return total, True
                raise
            if any(each is not None for each in found[len(leaves) : len(inputs)]):
                return total, True
            total = _sums(total, found[: len(leaves)])
            arrived[:begin] = _sums(arrived[:begin], found[len(inputs) :])
        return total, False

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        self.pairs.append((tensor, leaf_of(tensor)))
        return self.pairs[-1][1]


def gradient_at_first(
    function: Callable[[Mapping[str, Tree], Tree, Shared], tuple[Tensor, After]], shared: Shared
) -> tuple[Upstream, Tensor, After]:
    """∇function at `shared.first` by the name "", or nothing; its value, and what else it returned: as `gradients` gives it.

    What the function shares is computed, with its history, and kept.
    """
    with Recording():
        value, after = function(shared.leaves, shared.first, shared)
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
    fresh, shared.used = not shared.pairs, True
    inputs = [leaf for tree in shared.leaves.values() for leaf in _tree.leaves(tree)]
    total: list[Tensor | None] = [None] * len(inputs)
    with Recording():
        for place, sign in ((above, 1.0), (below, -1.0)):
            value, _ = function(shared.leaves, place, shared)
            everything = [*inputs, *(leaf for _, leaf in shared.pairs)]
            total += [None] * (len(everything) - len(total))
            if value.requires_grad and everything:
                weight = torch.full_like(value, sign)
                # What was shared just now may have history in common with the value.
                retain = fresh and place is above and bool(shared.pairs)
                total = _sums(total, reverse_pass((value,), everything, (weight,), retain=retain, again=False))
            del value
    direct, gathered = total[: len(inputs)], total[len(inputs) :]
    pulled, depends = shared.pulled(gathered)
    return grouped(shared.leaves, _sums(direct, pulled)), depends


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

"""Numbers that must be finite, and one look at all of them."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, final

import torch

from mlo import _tree
from mlo._errors import NumericalError
from mlo._modes import inside_transform, is_traced

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree


_IS_CPU: Callable[[Tensor], bool] = attrgetter("is_cpu")
_NUMBER: Callable[[Tensor], float] = methodcaller("item")


@final
class Finite:
    """What must be finite in an iteration: by level, step and term a number or a tree, in the order in which it came about.

    All is looked at when the iteration is over, a sum a tensor: one after the other they take half as long as here and there
    between reverse passes. Until then the trees are held, which are no more than what the levels moved to.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[str, int, str, Tree]] = []
        self._summed: list[tuple[str, int, str, Tensor]] = []
        self._numbers: list[Tensor] = []
        self._tensors: list[Tensor] = []

    def add(self, level: str, step: int, term: str, number: Tensor) -> None:
        """A zero-dimensional tensor must be finite."""
        self._seen.append((level, step, term, number))
        self._numbers.append(number)

    def add_all(self, level: str, step: int, term: str, tree: Tree) -> None:
        """All entries of `tree` must be finite, and so must the sum of each of its tensors."""
        self._seen.append((level, step, term, tree))
        self._tensors += _tree.leaves(tree)

    def numbers(self) -> list[tuple[str, int, str, Tensor]]:
        """What must be finite, as zero-dimensional tensors, which are all that is held of it from now on."""
        for level, step, term, tree in self._seen:
            for tensor in _tree.leaves(tree):
                self._summed.append((level, step, term, tensor.sum() if tensor.dim() else tensor))
        self._seen, self._numbers, self._tensors = [], [], []
        return self._summed

    def refuse(self, iteration: int) -> None:
        """Raise `NumericalError` for the first that is not. Inside a transform and while tracing nobody can look."""
        if inside_transform() or is_traced():
            return
        at_once = not self._summed and all(map(_IS_CPU, (*self._numbers, *self._tensors)))
        if at_once:  # nothing has to be waited for, and each lies in the cache
            totals = map(_NUMBER, map(torch.sum, self._tensors))
            if all(map(isfinite, map(_NUMBER, self._numbers))) and all(map(isfinite, totals)):
                return
        entries = self.numbers()
        if entries and not bool(_in_one([number for *_, number in entries]).isfinite().all()):
            level, step, term, _ = next(entry for entry in entries if not bool(entry[3].isfinite()))
            raise NumericalError(level=level, step=step, term=term, iteration=iteration)


def _in_one(numbers: list[Tensor]) -> Tensor:
    """Zero-dimensional tensors side by side."""
    if any(number.dtype != numbers[0].dtype for number in numbers):
        numbers = [number.double() for number in numbers]
    return torch.stack(numbers)

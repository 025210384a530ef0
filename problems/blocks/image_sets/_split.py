"""Shares of a labelled set with every class in proportion."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Share: TypeAlias = float
"""A part of a whole, between 0 and 1."""


def stratified(labels: Tensor, share: Share, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two sets of numbers of samples, in ascending order: a `share` of them, drawn class by class, and the others.

    Together ⌊share · n + ½⌋ are drawn of n. Class c gives ⌊share · n_c⌋ of its n_c samples, and the classes with the largest
    remainders one more (the first of equal ones), but never its last. With the same generator a smaller share is, up to
    these remainders, part of a larger one.

    - `labels`: int64 [n].
    """
    sizes: list[int] = torch.bincount(labels).tolist()
    members = torch.argsort(labels, stable=True).split(sizes)
    exact = [share * len(member) for member in members]
    counts = [int(number) for number in exact]
    left = int(share * len(labels) + 0.5) - sum(counts)
    by_remainder = sorted(range(len(members)), key=lambda c: (counts[c] - exact[c], c))
    for c in [c for c in by_remainder if counts[c] + 1 < len(members[c])][: max(0, left)]:
        counts[c] += 1
    drawn: list[Tensor] = []
    others: list[Tensor] = []
    for member, count in zip(members, counts, strict=True):
        shuffled = member[torch.randperm(len(member), generator=generator)]
        drawn.append(shuffled[:count])
        others.append(shuffled[count:])
    return _ascending(drawn), _ascending(others)


def _ascending(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).sort().values if parts else torch.zeros(0, dtype=torch.int64)

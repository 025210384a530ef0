"""Variables that must stay where a constraint says: the optimizer moves free numbers, and objectives see their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch.nn import functional

from mlo import _tree
from mlo._patterns import assigned

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Constraint, Tree


@final
@dataclass(frozen=True)
class Constraints:
    """Constraints by patterns of names; the first pattern that matches wins.

    softplus: y = log(1 + eˣ) > 0        sigmoid: 0 < y = 1/(1 + e⁻ˣ) < 1        softmax: y > 0, Σ y = 1 (last dimension)
    """

    by_pattern: Mapping[str, Constraint]

    def apply(self, free: Tree) -> Tree:
        """y, what objectives see."""
        kinds = self._kinds(free)
        named = {
            name: _image(kinds[name], tensor) if name in kinds else tensor for name, tensor in _named(free).items()
        }
        return _tree.rebuild(free, named.values())

    def inverse(self, constrained: Tree) -> Tree:
        """An x whose image is `constrained`. Raises ValueError for a tensor that is no image, saying where it must lie."""
        kinds = self._kinds(constrained)
        named = {
            name: _preimage(kinds[name], name, tensor) if name in kinds else tensor
            for name, tensor in _named(constrained).items()
        }
        return _tree.rebuild(constrained, named.values())

    def _kinds(self, tree: Tree) -> dict[str, Constraint]:
        won = assigned(tuple(self.by_pattern), tuple(_named(tree)))
        return {name: self.by_pattern[pattern] for pattern, names in won.items() if pattern for name in names}


def _image(kind: Constraint, free: Tensor) -> Tensor:
    match kind:
        case "softplus":
            return functional.softplus(free, threshold=40)  # beyond torch's own, 20, it would be off by 2e-9
        case "sigmoid":
            return free.sigmoid()
        case "softmax":
            return free.softmax(-1)


def _preimage(kind: Constraint, name: str, constrained: Tensor) -> Tensor:
    if constrained.numel() == 0:
        return constrained
    what = f"'{name}'" if name else "the variables"
    low, high = constrained.min().item(), constrained.max().item()
    match kind:
        case "softplus":
            if not low > 0:
                raise ValueError(f"{what} must be above 0 for softplus to reach, starts at {low:g}")
            return constrained + (-(-constrained).expm1()).log()
        case "sigmoid":
            if not 0 < low <= high < 1:
                worst = high if low > 0 else low
                raise ValueError(f"{what} must be above 0 and below 1 for a sigmoid to reach, starts at {worst:g}")
            return constrained.logit()
        case "softmax":
            error = (constrained.sum(-1) - 1).abs().max().item()
            if not (low > 0 and error <= torch.finfo(constrained.dtype).eps ** 0.5):
                wrong = f"has an entry {low:g}" if not low > 0 else f"is off by {error:g}"
                raise ValueError(
                    f"{what} must be above 0 and sum to 1 along the last dimension for a softmax to reach, {wrong}"
                )
            return constrained.log()


def _named(tree: Tree) -> Mapping[str, Tensor]:
    return tree if isinstance(tree, Mapping) else {"": tree}

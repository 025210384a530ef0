"""The gradient of linear layers, linearised as the factors it is made of, which are never multiplied.

A layer z = aWᵀ + b of a loss f has the gradients ∂f/∂W = δᵀa and ∂f/∂b = Σ δ with δ = ∂f/∂z. For a cotangent V, v on them

    ⟨V, δᵀa⟩ + ⟨v, Σ δ⟩ = ⟨δ, aVᵀ + v⟩

so that whoever only pulls gradients back needs δ as a recorded function, and the image aVᵀ + v of the layer's input, but no
gradient: of a step that is evaluated again that is one matrix product a layer less, of nine or ten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar, final

import torch
from torch.nn.functional import linear

from mlo import _tree
from mlo._autodiff import PlainAttention, Recording, grouped, leaf_of, pulled, reverse_pass
from mlo._chain import Layer, Watched

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream

After = TypeVar("After")


def linearised_gradient(
    function: Callable[[Mapping[str, Tree]], tuple[Tensor, After]], at: Mapping[str, Tree], own: str
) -> tuple[Callable[[], Tree] | None, After, Callable[..., Upstream]]:
    """∂function/∂at[own], what else `function` returned, and the pullback of that gradient: see `mlo._autodiff.linearise`.

    As factors where `function` puts the tensors of `at[own]` into linear layers of a chain and nowhere else, and otherwise
    as it is. The gradient is given by a call, which multiplies the factors; there is None where `function` does not depend
    on `at[own]`. At the outermost level only: not inside a transform, not traced, and not where `at` is recorded.
    """
    places: dict[str, Tree] = {name: _tree.apply(leaf_of, tree) for name, tree in at.items()}
    places[own] = watched = Watched(_tree.named(places[own]))
    with Recording(), PlainAttention():
        value, after = function(places)
        factored = watched.close()
        one = (torch.ones_like(value),)
        if not value.requires_grad:
            return None, after, _nothing
        if factored:
            ends = [layer.after for layer in watched.layers]
            found = reverse_pass((value,), ends, one, retain=True, again=True)
            pairs = [(layer, delta) for layer, delta in zip(watched.layers, found, strict=True) if delta is not None]
            factors = _Factors(watched, pairs, places)
            return factors.multiplied if pairs else None, after, factors.pull
        found = reverse_pass((value,), list(watched.values()), one, retain=True, again=True)
    gradient = grouped({own: watched}, found).get(own)
    if gradient is None:
        return None, after, _nothing
    numbers = _tree.detach(gradient)

    def pull(cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
        return pulled(gradient, cotangent, {name: places[name] for name in names}, retain=retain, again=False)

    return lambda: numbers, after, pull


def _nothing(cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
    """The pullback of a gradient that is not there."""
    return {}


@final
class _Factors:
    """A gradient as pairs of a layer and δ, a recorded function of `places`."""

    def __init__(
        self, leaves: Mapping[str, Tensor], pairs: list[tuple[Layer, Tensor]], places: Mapping[str, Tree]
    ) -> None:
        self._leaves, self._places = leaves, places
        self._factors = [(layer, delta, delta.detach()) for layer, delta in pairs]

    def pull(self, cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
        """d⟨δ, aVᵀ + v⟩ is ⟨dδ, aVᵀ + v⟩ + ⟨δ, da Vᵀ⟩: one reverse pass from both."""
        weights = _tree.named(cotangent)
        outputs, arrived = list["Tensor"](), list["Tensor"]()
        for layer, delta, numbers in self._factors:
            with Recording():
                bias = None if layer.bias is None else weights[layer.bias]
                image = linear(layer.before, weights[layer.weight], bias)
            if delta.requires_grad:
                outputs.append(delta)
                arrived.append(image.detach())
            if image.requires_grad:
                outputs.append(image)
                arrived.append(numbers)
        wanted = {name: self._places[name] for name in names}
        inputs = [leaf for tree in wanted.values() for leaf in _tree.leaves(tree)]
        if not outputs or not inputs:
            return {}
        return grouped(wanted, reverse_pass(tuple(outputs), inputs, tuple(arrived), retain=retain, again=False))

    def multiplied(self) -> Tree:
        """The gradient itself."""
        total = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in self._leaves.items()}
        for layer, _, delta in self._factors:
            rows = delta.reshape(-1, delta.shape[-1])
            total[layer.weight].addmm_(rows.mT, layer.before.detach().reshape(len(rows), -1))
            if layer.bias is not None:
                total[layer.bias].add_(rows.sum(0))
        return total

"""The gradient of linear layers, linearised as the factors it is made of, which are never multiplied.

A layer z = aWᵀ + b of a loss f has the gradients ∂f/∂W = δᵀa and ∂f/∂b = Σ δ with δ = ∂f/∂z. For a cotangent V, v on them

    ⟨V, δᵀa⟩ + ⟨v, Σ δ⟩ = ⟨δ, aVᵀ + v⟩

so that whoever only pulls gradients back needs δ as a recorded function, and the image aVᵀ + v of the layer's input, but no
gradient: of a step that is evaluated again that is one matrix product a layer less, of nine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar, final

import torch
from torch.nn.functional import linear

from mlo import _tree
from mlo._autodiff import gradient_of, grouped, leaves_of, pulled, reverse_pass
from mlo._chain import Watched
from mlo._modes import PlainAttention, Recording, inside_transform

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream

After = TypeVar("After")


def factored_gradient(
    function: Callable[[Mapping[str, Tree]], tuple[Tensor, After]], at: Mapping[str, Tree], own: str
) -> tuple[Callable[[], Tree] | None, Tensor, After, Callable[..., Upstream]]:
    """`mlo._autodiff.gradient_with_pullback`, with a call that gives the gradient in place of it. Not traced.

    As factors where `function` puts the tensors of `at[own]` into linear layers of a chain and nowhere else, and otherwise
    as it is. The call multiplies the factors.
    """
    leaves, _ = leaves_of(at)
    watched = Watched(_tree.named(leaves[own]))
    places = {**leaves, own: watched}
    with Recording(), PlainAttention():
        try:
            value, after = function(places)
        finally:
            layers = watched.close()
        if layers and value.requires_grad:
            one = (torch.ones_like(value),)
            found = reverse_pass((value,), [layer.after for layer in layers], one, retain=True, again=True)
            pairs: list[_Pair] = []
            for layer, delta in zip(layers, found, strict=True):
                if delta is not None:
                    pairs.append(_Pair(layer.weight, layer.bias, layer.before, layer.versions[0], delta))
            factors = _Factors(watched, pairs, places)
            return factors.multiplied if pairs else None, value.detach(), after, factors.pull
        gradient, pull = gradient_of(value, places, own)
    return None if gradient is None else lambda: gradient, value.detach(), after, pull


class _Pair(NamedTuple):
    """The gradient of a linear layer: the names of its tensors, what went into it with its version, and δ."""

    weight: str
    bias: str | None
    before: Tensor
    version: int
    delta: Tensor

    def multiplied(self, delta: Tensor, before: Tensor) -> dict[str, Tensor]:
        """Both gradients, by name."""
        rows, columns = (part.flatten(0, -2) if part.dim() > 1 else part[None] for part in (delta, before))
        found = {self.weight: rows.mT @ columns}
        return found if self.bias is None else {**found, self.bias: rows.sum(0)}


@final
class _Factors:
    """A gradient as pairs of what goes into a layer and δ, recorded functions of `places`."""

    def __init__(self, leaves: Mapping[str, Tensor], pairs: Sequence[_Pair], places: Mapping[str, Tree]) -> None:
        self._leaves, self._pairs, self._places = leaves, pairs, places

    def pull(self, cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
        """d⟨δ, aVᵀ + v⟩ is ⟨dδ, aVᵀ + v⟩ + ⟨δ, da Vᵀ⟩: one reverse pass from both."""
        weights, wanted = _tree.named(cotangent), {name: self._places[name] for name in names}
        if inside_transform():  # of a method's own: its directions are batched, and what is recorded is not
            with Recording():
                gradient = self._product([(pair, pair.delta, pair.before) for pair in self._pairs])
            return pulled(gradient, cotangent, wanted, retain=True, again=False)
        outputs: list[Tensor] = []
        arrived: list[Tensor] = []
        with Recording():
            for weight, bias, before, version, delta in self._pairs:
                if before._version != version:
                    raise RuntimeError(
                        "what went into a linear layer has been changed in place before it was pulled back to"
                    )
                image = linear(before, weights[weight], None if bias is None else weights[bias])
                if delta.requires_grad:
                    outputs.append(delta)
                    arrived.append(image.detach())
                if image.requires_grad:
                    outputs.append(image)
                    arrived.append(delta.detach())
        inputs: list[Tensor] = []
        for tree in wanted.values():
            inputs += _tree.leaves(tree)
        if not outputs or not inputs:
            return {}
        return grouped(wanted, reverse_pass(outputs, inputs, arrived, retain=retain, again=False))

    def multiplied(self) -> Tree:
        """The gradient itself."""
        return self._product([(pair, pair.delta.detach(), pair.before.detach()) for pair in self._pairs])

    def _product(self, factors: Iterable[tuple[_Pair, Tensor, Tensor]]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for pair, delta, before in factors:
            for name, tensor in pair.multiplied(delta, before).items():
                total[name] = total[name] + tensor if name in total else tensor
        return {
            name: total[name] if name in total else leaf.new_zeros(leaf.shape) for name, leaf in self._leaves.items()
        }

"""The gradient of linear layers, linearised as the factors it is made of, and multiplied for whoever asks for it alone.

A layer z = aWᵀ + b of a loss f has the gradients ∂f/∂W = δᵀa and ∂f/∂b = Σ δ with δ = ∂f/∂z. For a cotangent V, v on them

    ⟨V, δᵀa⟩ + ⟨v, Σ δ⟩ = ⟨δ, aVᵀ + v⟩

so that whoever only pulls gradients back needs δ as a recorded function, and the image aVᵀ + v of the layer's input, but no
gradient: of a step that is evaluated again that is one matrix product a layer less, of nine.

Where the cotangent is itself such a gradient, V = δ'ᵀa' of an upper level's batch, its image is (aa'ᵀ)δ': inner products of
samples. In front of a wide layer that takes fewer multiplications than V alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeVar, final

import torch
from torch.nn.functional import linear

from mlo import _tree
from mlo._autodiff import gradient_of, grouped, leaves_of, pulled, reverse_pass
from mlo._chain import Layer, Watched
from mlo._modes import NotRecording, PlainAttention, Recording, inside_transform

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._types import Tree, Upstream

After = TypeVar("After")


def factored_gradient(
    function: Callable[[Mapping[str, Tree]], tuple[Tensor, After]], at: Mapping[str, Tree], own: str
) -> tuple[Callable[[], Tree] | None, Tensor, After, Callable[..., Upstream]]:
    """`mlo._autodiff.gradient_with_pullback`, with a call that gives the gradient in place of it.

    As factors where `function` puts the tensors of `at[own]` into linear layers of a chain and nowhere else, and otherwise
    as it is. The call multiplies the factors.
    """
    with Recording(), PlainAttention():
        value, after, places, watched, layers = _evaluated(function, at, own)
        if layers and value.requires_grad:
            one = (torch.ones_like(value),)
            found = reverse_pass((value,), [after for _, _, _, after, _, _ in layers], one, retain=True, again=True)
            pairs = _paired(layers, found)
            kept = _Recorded(watched, pairs, places)
            return kept.multiplied if pairs else None, value.detach(), after, kept.pull
        gradient, pull = gradient_of(value, places, own)
    return None if gradient is None else lambda: gradient, value.detach(), after, pull


def gradients_as_factors(
    function: Callable[[Mapping[str, Tree]], tuple[Tensor, After]], at: Mapping[str, Tree], factored: str
) -> tuple[Upstream, Tensor, After]:
    """`mlo._autodiff.gradients`, with that in `at[factored]` as `Factored` where it can be.

    Not inside a transform, and at the outermost level only: not where `at` is recorded.
    """
    with Recording():
        value, after, places, watched, layers = _evaluated(function, at, factored)
    if not value.requires_grad:
        return {}, value.detach(), after
    others = {name: tree for name, tree in places.items() if name != factored} if layers else places
    inputs = [after for _, _, _, after, _, _ in layers]
    for tree in others.values():
        inputs += _tree.leaves(tree)
    found = reverse_pass((value,), inputs, (torch.ones_like(value),), retain=False, again=False)
    gradient = grouped(others, found[len(layers) :])
    pairs = _paired(layers, found, graph=False)
    if pairs:
        gradient = {**gradient, factored: Factored(watched, pairs)}
    return gradient, value.detach(), after


def takes_factors(pull: Callable[..., Upstream]) -> bool:
    """Whether a pullback of `factored_gradient` makes use of a cotangent that is left as factors."""
    return isinstance(getattr(pull, "__self__", None), _Recorded)


def _evaluated(
    function: Callable[[Mapping[str, Tree]], tuple[Tensor, After]], at: Mapping[str, Tree], name: str
) -> tuple[Tensor, After, Mapping[str, Tree], Watched, list[Layer]]:
    """`function` of leaves, of which those in `at[name]` are watched: its value, what else it returned, the leaves, those
    that were watched, and the linear layers that they went into; none where they went elsewhere too.
    """
    leaves, _ = leaves_of(at)
    watched = Watched(_tree.named(leaves[name]))
    places = {**leaves, name: watched}
    try:
        value, after = function(places)
    finally:
        layers = watched.close()
    return value, after, places, watched, layers


def _paired(layers: Iterable[Layer], deltas: Iterable[Tensor | None], *, graph: bool = True) -> list[_Pair]:
    """The gradients of `layers`, without those that the value does not depend on.

    Of what went into the layers the numbers are held, and the `graph` only if it is asked for.
    """
    return [
        _Pair(weight, bias, before if graph else before.detach(), version, delta)
        for (weight, bias, before, _, version, _), delta in zip(layers, deltas, strict=False)
        if delta is not None
    ]


class _Pair(NamedTuple):
    """The gradient of a linear layer: the names of its tensors, what went into it with its version, and δ."""

    weight: str
    bias: str | None
    before: Tensor
    version: int
    delta: Tensor

    def refuse_changed(self) -> None:
        """Raise RuntimeError if what went into the layer has changed since."""
        if self.before._version != self.version:
            raise RuntimeError("what went into a linear layer has been changed in place before it was pulled back to")

    def rows(self) -> tuple[Tensor, Tensor]:
        """δ and what went into the layer, a row a sample; the latter must not have changed."""
        self.refuse_changed()
        delta, before = self.delta, self.before
        dimensions = delta.dim()
        if dimensions == 2:
            return delta, before
        return (delta.flatten(0, -2), before.flatten(0, -2)) if dimensions > 2 else (delta[None], before[None])


def _multiplied(pairs: Iterable[_Pair], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that `pairs` are the factors of, by the names of `leaves`. Zero where there are none."""
    total: dict[str, Tensor] = {}
    for pair in pairs:
        delta, before = pair.rows()
        product = delta.t().mm(before)
        total[pair.weight] = total[pair.weight] + product if pair.weight in total else product
        if pair.bias is not None:
            shift = delta.sum(0)
            total[pair.bias] = total[pair.bias] + shift if pair.bias in total else shift
    return {name: total[name] if name in total else leaf.new_zeros(leaf.shape) for name, leaf in leaves.items()}


@final
class Factored(Mapping[str, "Tensor"]):
    """A gradient by name, of tensors without a history, that is multiplied out when somebody looks at it."""

    def __init__(self, leaves: Mapping[str, Tensor], pairs: Sequence[_Pair]) -> None:
        self._leaves, self._pairs = leaves, pairs
        self._pair_of: dict[str, _Pair | None] = {}  # None where a layer was run more than once
        for pair in pairs:
            self._pair_of[pair.weight] = None if pair.weight in self._pair_of else pair

    @cached_property
    def _whole(self) -> Mapping[str, Tensor]:
        with NotRecording():
            return _multiplied(self._pairs, self._leaves)

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def image(self, before: Tensor, weight: str, bias: str | None) -> Tensor:
        """aVᵀ + v of what goes into a layer, for what stands here under the names of its tensors.

        (aa'ᵀ + 1)δ' where that takes fewer multiplications, V and v not being there: the 1 is what Σ δ' comes from. In
        float16, aa'ᵀ could overflow where V, to which each sample adds little, does not.
        """
        pair = self._pair_of.get(weight)
        if pair is None or "_whole" in vars(self):
            return linear(before, self[weight], None if bias is None else self[bias])
        delta, other = pair.rows()
        here, there, (high, wide) = prod(before.shape[:-1]), other.shape[0], self._leaves[weight].shape
        if here * there * (high + wide) < (here + there) * high * wide and delta.dtype is not torch.float16:
            return linear(before, other, None if bias is None else other.new_ones(there)) @ delta
        return linear(before, delta.t().mm(other), None if bias is None else delta.sum(0))


@final
class _Recorded:
    """A gradient as pairs of what goes into a layer and δ, recorded functions of `places`."""

    def __init__(self, leaves: Mapping[str, Tensor], pairs: Sequence[_Pair], places: Mapping[str, Tree]) -> None:
        self._leaves, self._pairs, self._places = leaves, pairs, places

    def pull(self, cotangent: Tree, names: Iterable[str], *, retain: bool = False) -> Upstream:
        """d⟨δ, aVᵀ + v⟩ is ⟨dδ, aVᵀ + v⟩ + ⟨δ, da Vᵀ⟩: one reverse pass from both."""
        weights, wanted = _tree.named(cotangent), {name: self._places[name] for name in names}
        if inside_transform():  # of a method's own: its directions are batched, and what is recorded is not
            with Recording():
                gradient = _multiplied(self._pairs, self._leaves)
            return pulled(gradient, cotangent, wanted, retain=True, again=False)
        outputs: list[Tensor] = []
        arrived: list[Tensor] = []
        with Recording():
            for pair in self._pairs:
                weight, bias, before, _, delta = pair
                pair.refuse_changed()
                if type(weights) is Factored:
                    image = weights.image(before, weight, bias)
                else:
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
        with NotRecording():
            return _multiplied(self._pairs, self._leaves)

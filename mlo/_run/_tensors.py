"""Trees of tensors in one safetensors file, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import safetensors.torch

if TYPE_CHECKING:
    from torch import Tensor

_SEPARATOR = ":"


def flat(tree: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """The tensors of nested mappings by their path, `values:classifier:layer.weight`; None where a mapping is empty.

    Names are quoted like URLs, so that one with a separator in it stays one name.
    """
    found: dict[str, Tensor | None] = {}

    def put(part: Any, path: tuple[str, ...]) -> None:
        if not isinstance(part, Mapping):
            found[_SEPARATOR.join(path)] = part
        elif not part:
            found[_SEPARATOR.join((*path, ""))] = None
        else:
            for name, below in part.items():
                put(below, (*path, quote(name, safe="")))

    for name, part in tree.items():
        put(part, (name,))
    return found


def nested(tensors: Mapping[str, Tensor], order: Iterable[str]) -> dict[str, Any]:
    """The reverse of `flat`, whose keys are `order`: safetensors keeps none, and sums of many numbers depend on it."""
    tree: dict[str, Any] = {}
    for path in order:
        *folders, name = path.split(_SEPARATOR)
        here = tree
        for part in folders:
            here = here.setdefault(unquote(part), {})
        if path in tensors or not path.endswith(_SEPARATOR):
            here[unquote(name)] = tensors[path]
    return tree


def encoded(tensors: Mapping[str, Tensor | None]) -> bytes:
    """As safetensors, which wants every tensor in memory of its own."""
    plain = {path: tensor.detach().cpu().contiguous() for path, tensor in tensors.items() if tensor is not None}
    seen: set[int] = set()
    for path, tensor in plain.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in seen:
            plain[path] = tensor.clone()
        seen.add(tensor.data_ptr())
    return safetensors.torch.save(plain)


def decoded(data: bytes) -> dict[str, Tensor]:
    """On the CPU. Raises `safetensors.SafetensorError` for anything else."""
    return safetensors.torch.load(data)

"""Tensors in mappings, tuples and lists as one list of them, and the form they stood in.

The form can be compared and hashed: two parts of equal form differ in nothing but the numbers in their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from mlo._state import Batches

if TYPE_CHECKING:
    from torch import Tensor

Form: TypeAlias = tuple[Any, ...]
"""What `flatten` gives: the kind of a part, and the forms of its own parts."""

_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def flatten(part: Any, tensors: list[Tensor]) -> Form:
    """The form of `part`, whose tensors are added to `tensors`.

    Numbers, strings and None belong to the form. Raises TypeError for anything that may hold tensors out of sight.
    """
    if isinstance(part, torch.Tensor):
        tensors.append(part)
        return torch.Tensor, part.shape, part.stride(), part.dtype, part.device
    if isinstance(part, dict):
        items: dict[Any, Any] = part
        return dict, tuple(items), tuple([flatten(each, tensors) for each in items.values()])
    if isinstance(part, tuple | list):
        members: tuple[Any, ...] | list[Any] = part
        return type(members), tuple([flatten(each, tensors) for each in members])
    if isinstance(part, Batches):
        return Batches, tuple([flatten(each, tensors) for each in part.batches])
    if isinstance(part, Mapping):
        return flatten(dict(part), tensors)  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(part, _CONSTANTS):
        raise TypeError(f"expected tensors, numbers and strings in mappings, tuples and lists, got {part!r}")
    return type(part), part


def rebuild(form: Form, tensors: Iterator[Tensor]) -> Any:
    """What `flatten` gave this form, with the next of `tensors`. Mappings are dictionaries."""
    kind = form[0]
    if kind is torch.Tensor:
        return next(tensors)
    if kind is dict:
        return {key: rebuild(each, tensors) for key, each in zip(form[1], form[2], strict=True)}
    if kind is Batches:
        return Batches([rebuild(each, tensors) for each in form[1]])
    if issubclass(kind, tuple | list):
        members = [rebuild(each, tensors) for each in form[1]]
        return kind(*members) if hasattr(kind, "_fields") else kind(members)
    return form[1]

"""A mapping that stays as it was made: options, data settings and levels of a specification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, final

V = TypeVar("V")


@final
class Frozen(Mapping[str, V]):
    """An immutable mapping; equal to any mapping with the same items, in whatever order, and hashable if they are."""

    __slots__ = ("_items",)
    _items: dict[str, V]

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        object.__setattr__(self, "_items", dict(items or {}))

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Frozen mapping does not change")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._items == dict(other)  # type: ignore[reportUnknownArgumentType]

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[type[Frozen[V]], tuple[dict[str, V]]]:
        return Frozen, (self._items,)


def freeze(value: Any) -> Any:
    """`value` with every mapping `Frozen` and every list a tuple, all the way down."""
    if isinstance(value, Mapping):
        items: Mapping[str, Any] = value
        return Frozen({key: freeze(item) for key, item in items.items()})
    if isinstance(value, list | tuple):
        members: list[Any] | tuple[Any, ...] = value
        return tuple(freeze(item) for item in members)
    return value


def thaw(value: Any) -> Any:
    """`value` with plain dicts and lists, for writers of YAML and JSON."""
    if isinstance(value, Mapping):
        items: Mapping[str, Any] = value
        return {key: thaw(item) for key, item in items.items()}
    if isinstance(value, list | tuple):
        members: list[Any] | tuple[Any, ...] = value
        return [thaw(item) for item in members]
    return value

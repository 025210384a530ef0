"""Durations in passes over the level's own stream, which only a graph file can know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast, final

T = TypeVar("T")


@final
@dataclass(frozen=True, kw_only=True)
class Epochs:
    """One duration or several, in passes over the level's own stream: `{epochs: 25}`, `{epochs: [60, 120]}`.

    Building a graph file puts iterations in their place. Raises ValueError for a duration below 1.
    """

    epochs: int | tuple[int, ...]

    def __post_init__(self) -> None:
        for duration in written(self.epochs):
            if duration < 1:
                raise ValueError(f"epochs must be at least 1, got {duration}")


Durations: TypeAlias = int | tuple[int, ...] | Epochs
"""What a duration, or several of them, may be."""


def in_iterations(value: T, passes: Callable[[int], int]) -> T:
    """`value`, an optimizer, a schedule or a mapping of options, with iterations in place of all `Epochs` in it.

    `passes(n)` says how many iterations n passes take.
    """
    return cast("T", _in_iterations(value, passes))


def _in_iterations(value: Any, passes: Callable[[int], int]) -> Any:
    if isinstance(value, Epochs):
        return passes(value.epochs) if isinstance(value.epochs, int) else tuple(map(passes, value.epochs))
    if isinstance(value, Mapping):
        options: Mapping[Any, Any] = value
        return {**options, **_changed(options, passes)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = _changed({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, passes)
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _changed(parts: Mapping[Any, Any], passes: Callable[[int], int]) -> dict[Any, Any]:
    """Those that hold `Epochs`, with iterations in their place."""
    converted = {name: _in_iterations(part, passes) for name, part in parts.items()}
    return {name: part for name, part in converted.items() if part != parts[name]}


def written(durations: Durations) -> tuple[int, ...]:
    """The numbers of `durations`, whatever their unit."""
    if isinstance(durations, Epochs):
        return written(durations.epochs)
    return (durations,) if isinstance(durations, int) else tuple(durations)


def known(name: str, durations: Durations) -> tuple[int, ...]:
    """`durations` in iterations. Raises ValueError for `Epochs`."""
    if isinstance(durations, Epochs):
        raise ValueError(f"{name}: only a graph file knows how long an epoch is; give iterations")
    return written(durations)


def refuse_several(name: str, durations: tuple[int, ...]) -> None:
    """Raise ValueError unless this is one duration, of at least 1."""
    if len(durations) != 1:
        raise ValueError(f"{name} must be one duration, got {len(durations)}")
    if durations[0] < 1:
        raise ValueError(f"{name} must be at least 1, got {durations[0]}")

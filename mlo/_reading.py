"""Optimizers that read their options from levels: what they may read, and which methods differentiate it.

Works on names and shapes, without torch, so that a wrong graph is answered in under a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mlo import _structure
from mlo._errors import nearest
from mlo._patterns import assigned
from mlo.optimizer import Read, options_read

if TYPE_CHECKING:
    from mlo.hypergradient import AbstractHypergradient
    from mlo.optimizer import AbstractOptimizer

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""The shapes of a level's tensors by name; a single one has the empty name."""


class Misread(NamedTuple):
    """What is wrong with an option that is read: the keys that lead to it from the optimizer's, and what to do."""

    path: tuple[str, ...]
    message: str


def unlisted(level: _structure.Declared, optimizer: AbstractOptimizer, known: Iterable[str]) -> list[Misread]:
    """Options read from a level that is not there, or that `level` is not given."""
    found: list[Misread] = []
    names = sorted(known)
    for path, read in options_read(optimizer):
        if read.level == level.name:
            found.append(Misread((*path, "level"), "an optimizer cannot read the level that it moves"))
        elif read.level not in names:
            hint = f"{nearest(read.level, names)}\n  Known: {', '.join(names)}"
            found.append(Misread((*path, "level"), f"no level named '{read.level}'.{hint}"))
        elif read.level not in level.given:
            other = next((arrow for arrow in _structure.ARROWS[1:] if read.level in getattr(level, arrow)), None)
            listed = "is not listed; add it to `given`" if other is None else f"is listed under `{other}`"
            found.append(Misread((*path, "level"), f"'{read.level}' {listed}: an optimizer reads what is given"))
    return found


def misfits(optimizer: AbstractOptimizer, parameters: Shapes, levels: Mapping[str, Shapes]) -> list[Misread]:
    """Options of parameters of these shapes that are read from tensors which are not there, or do not fit."""
    groups = optimizer.groups or {}
    won = assigned(tuple(groups), tuple(parameters))
    found: list[Misread] = []
    for path, read in options_read(optimizer):
        option = path[-1]
        if option.startswith("clip_"):
            found += _misfits(path, read, {"": ()}, levels[read.level], whole=True)
            continue
        others = {name for pattern, changes in groups.items() if option in changes for name in won.get(pattern, ())}
        own = won.get(path[1], ()) if len(path) > 1 else [name for name in parameters if name not in others]
        found += _misfits(path, read, {name: parameters[name] for name in own}, levels[read.level])
    return found


def reads_live(optimizer: AbstractOptimizer | None, live: Iterable[str]) -> list[tuple[tuple[str, ...], Read]]:
    """The options that `optimizer` reads from one of the levels in `live`."""
    names = set(live)
    return [] if optimizer is None else [(path, read) for path, read in options_read(optimizer) if read.level in names]


def left_out(
    levels: Mapping[str, _structure.Declared],
    optimizers: Mapping[str, AbstractOptimizer],
    methods: Mapping[str, AbstractHypergradient],
) -> dict[str, str]:
    """Levels whose method would leave out what reaches their response through their optimizer's options, and why."""
    found: dict[str, str] = {}
    for upper in levels.values():
        for name, live in _live(upper, levels, set()):
            reads = reads_live(optimizers.get(name), live)
            if name in methods and not methods[name].follows_optimizer:
                for path, read in reads[:1]:
                    found[name] = (
                        f"{type(methods[name]).__name__} does not follow the optimizer's steps: how the response depends on "
                        f"{path[-1]}, read from '{read.level}', would be left out without a word; `unroll` follows them"
                    )
    return found


def _live(
    upper: _structure.Declared, levels: Mapping[str, _structure.Declared], above: set[str]
) -> Iterator[tuple[str, set[str]]]:
    """Levels that are differentiated for `upper`, and in what: below one in the middle, also in what is above it."""
    below = () if upper.frozen else _structure.differentiated(upper, levels)
    live = {upper.name, *below, *above}
    for name in below:
        yield name, live
        if levels[name].nested == "reduced":
            yield from _live(levels[name], levels, live)


def _misfits(
    path: tuple[str, ...], read: Read, parameters: Shapes, tensors: Shapes, *, whole: bool = False
) -> list[Misread]:
    chosen = read.among(tuple(tensors), tuple(parameters))
    listed = ", ".join(sorted(tensors))
    for parameter, shape in parameters.items():
        if parameter in chosen and tensors[chosen[parameter]] in ((), shape):
            continue
        if parameter in chosen:
            name = f"{read.level}.{chosen[parameter]}".removesuffix(".")
            what = (
                "expected one number" if whole else f"parameter '{parameter}' has {shape}" if parameter else f"{shape}"
            )
            fits = what if whole else f"expected one number or the shape of what it is for: {what}"
            return [Misread(path, f"'{name}' has shape {tensors[chosen[parameter]]}; {fits}")]
        if "" in tensors:
            return [Misread(path, f"'{read.level}' is a single tensor: leave out the name '{read.name}'")]
        if chosen:
            wanted = parameter if read.name is None else f"{read.name}.{parameter}"
            return [
                Misread(path, f"'{read.level}' has no tensor '{wanted}'.{nearest(wanted, tensors)}\n  Known: {listed}")
            ]
        if read.name is None:
            each = "" if whole else ", or call one like each parameter"
            return [Misread(path, f"'{read.level}' holds several tensors: name one{each}.\n  Known: {listed}")]
        each = "" if whole else f", nor a '{read.name}.{parameter}' for each parameter"
        hint = f"{each}.{nearest(read.name, tensors)}\n  Known: {listed}"
        return [Misread(path, f"'{read.level}' has no tensor '{read.name}'{hint}")]
    return []

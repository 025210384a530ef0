"""A YAML tree in which every value, and every key of a mapping, knows where it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, final

KeyPath: TypeAlias = tuple[str | int, ...]
"""The keys (and list positions) that lead to a value: `("levels", "meta", "given", 0)`."""

Plain: TypeAlias = "str | int | float | bool | tuple[Plain, ...] | dict[str, Plain] | None"
"""What a tree holds once places are left out; lists come as tuples."""

CHOICES = ("variables", "objective", "optimizer", "hypergradient")
"""The keys of a level whose value is `name` or `{name: {option: value}}`."""


@final
@dataclass(frozen=True)
class Place:
    """A position in a file, counted from 1; line 0 is no position (an override). `str()` is `file:line:column`.

    `folder` is what relative paths written at this place are relative to.
    """

    file: str
    line: int = 0
    column: int = 0
    folder: str = field(default=".", compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@final
@dataclass(frozen=True)
class Leaf:
    """One scalar."""

    place: Place
    value: str | int | float | bool | None


@final
@dataclass(frozen=True)
class Series:
    """A list."""

    place: Place
    items: tuple[Node, ...]


@final
@dataclass(frozen=True)
class Entry:
    """One value of a mapping, with the place of its key."""

    key: Place
    node: Node


@final
@dataclass(frozen=True)
class Table:
    """A mapping, in the order in which it was written."""

    place: Place
    entries: Mapping[str, Entry]

    def get(self, *keys: str) -> Node | None:
        """The value at the end of `keys`, or None where the path ends early."""
        node: Node = self
        for key in keys:
            if not isinstance(node, Table) or key not in node.entries:
                return None
            node = node.entries[key].node
        return node


Node: TypeAlias = Leaf | Series | Table


def fold(name: str) -> str:
    """The form in which names are compared: case and underscores do not count."""
    return name.replace("_", "").casefold()


def plain(node: Node) -> Plain:
    """The tree's values without their places."""
    match node:
        case Leaf(value=value):
            return value
        case Series(items=items):
            return tuple(plain(item) for item in items)
        case Table(entries=entries):
            return {key: plain(entry.node) for key, entry in entries.items()}


def mapped(table: Table, change: Callable[[str, Entry], Entry | None]) -> Table:
    """`table` with each entry replaced by `change(key, entry)`, or left out where that is None."""
    changed = ((key, change(key, entry)) for key, entry in table.entries.items())
    return Table(table.place, {key: entry for key, entry in changed if entry is not None})


def single(node: Node) -> tuple[str, Entry] | None:
    """The only key of a mapping and its entry; None for anything else."""
    if isinstance(node, Table) and len(node.entries) == 1:
        return next(iter(node.entries.items()))
    return None


def is_choice(path: KeyPath) -> bool:
    """Whether `path` is where a level names its variables, objective, optimizer or method."""
    return len(path) == 3 and path[0] == "levels" and path[2] in CHOICES


def dotted(path: KeyPath) -> str:
    """`levels.meta.given[0]`; a key that itself holds a dot is quoted."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            shown = f'"{step}"' if "." in step else step
            text += f".{shown}" if text else shown
    return text


def locate(tree: Table, path: KeyPath, *, key: bool = False) -> Place:
    """Where `path` was written: its value (a choice: its name), or its key if `key`.

    Where nothing was written, the key of the closest mapping around it. The name of a choice may be left out of the path.
    """
    node: Node = tree
    named = tree.place
    for depth, step in enumerate(path):
        choice = single(node) if is_choice(path[:depth]) else None
        if choice is not None:
            named, node = choice[1].key, choice[1].node
            if isinstance(step, str) and fold(step) == fold(choice[0]):
                continue
        match node:
            case Table(entries=entries) if isinstance(step, str) and step in entries:
                named, node = entries[step].key, entries[step].node
            case Series(items=items) if isinstance(step, int) and step < len(items):
                node = items[step]
                named = node.place
            case Leaf():  # `optimizer: sgd`, asked for an option of `sgd`
                return node.place
            case _:
                return named
    if key:
        return named
    choice = single(node) if is_choice(path) else None
    return choice[1].key if choice is not None else node.place


def walk(node: Node) -> Iterator[Node]:
    """`node` and everything below it."""
    yield node
    if isinstance(node, Table):
        for entry in node.entries.values():
            yield from walk(entry.node)
    elif isinstance(node, Series):
        for item in node.items:
            yield from walk(item)

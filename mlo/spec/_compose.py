"""One tree from a file, the files it extends, and the overrides given with it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from mlo._errors import SpecError, nearest
from mlo.spec._faults import Broken, Line, expected, known
from mlo.spec._files import Found, find, text_of
from mlo.spec._merge import is_null, merged
from mlo.spec._nodes import Entry, Leaf, Node, Place, Table, fold, mapped, plain
from mlo.spec._yaml import DEEPEST, read, read_value

_SEGMENT = r'(?:"[^"]+"|[^."=\s]+)'
_KEY = re.compile(rf"{_SEGMENT}(?:\.{_SEGMENT})*")


def read_graph(found: Found, chain: tuple[Found, ...] = ()) -> tuple[Table, list[Line]]:
    """The tree written in a file with all that it extends merged in, and what is wrong with the text.

    Raises `Broken` where a file of the chain cannot be read, is missing, or extends itself.
    """
    folder = str(found.path.parent)
    own, lines = read(text_of(found), found.shown, folder)
    start = Place(found.shown, 1, 1, folder)
    written = own.entries.get("extends")
    own = Table(start, {key: entry for key, entry in own.entries.items() if key != "extends"})
    if written is None or is_null(written.node):
        return own, lines
    place, value = written.node.place, plain(written.node)
    if not isinstance(value, str):
        raise Broken(place, f"extends: {expected('the path of a graph', value)}.")
    try:
        base_file = find(value, folder, os.path.dirname(found.shown))
    except SpecError as error:
        raise Broken(place, f"extends: {error}") from error
    chain = (*chain, found)
    if base_file.path in [each.path for each in chain]:
        names = [each.shown for each in chain]
        first = [each.path for each in chain].index(base_file.path)
        cycle = " → ".join([*names[first:], names[first]])
        raise Broken(place, f"extends: graphs extend each other in a cycle: {cycle}.")
    base, more = read_graph(base_file, chain)
    return Table(start, merged(base, own).entries), [*more, *lines]


def overridden(tree: Table, overrides: Sequence[str]) -> tuple[Table, list[Line]]:
    """`tree` with each `key=value` merged in, in order, and what is wrong with them."""
    lines: list[Line] = []
    for text in overrides:
        try:
            names, value, found = _override(text)
        except Broken as broken:
            lines.append(broken.line)
            continue
        lines += found
        if nothing := _removes_nothing(tree, names, value):
            lines += nothing
            continue
        node = value
        for name in reversed(names):
            node = Table(value.place, {name: Entry(value.place, node)})
        assert isinstance(node, Table), "an override has at least one key"
        tree = merged(tree, node)
    return tree, lines


def _override(text: str) -> tuple[tuple[str, ...], Node, list[Line]]:
    """The keys and the value of `key=value`; everything in it has the place `<override key=value>`."""
    place = Place(f"<override {text}>", folder=os.getcwd())
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise Broken(place, "an override is written key=value, such as seed=1 or levels.meta.every=2.")
    if not _KEY.fullmatch(key):
        raise Broken(place, f"'{key}' is not a path of keys, such as levels.meta.every.")
    names = tuple(name.strip('"') for name in re.findall(_SEGMENT, key))
    if len(names) > DEEPEST:
        raise Broken(place, f"nested deeper than {DEEPEST}.")
    if not value.strip():
        raise Broken(place, f"no value for '{key}'; write {key}=null to remove it.")
    if names[0] == "extends":
        raise Broken(place, "`extends` stands in a file; an override changes what the file says.")
    return (names, *read_value(value, place))


def _removes_nothing(tree: Table, names: tuple[str, ...], value: Node) -> list[Line]:
    """A removed option or setting that is not there is a typing error: nothing later would notice it."""
    if not is_null(value) or len(names) < 2 or (names[0] == "levels" and len(names) < 4):
        return []  # what is known at these depths is checked when the spec is
    node: Node = tree
    for depth, name in enumerate(names):
        entries = node.entries if isinstance(node, Table) else {}
        match = next((key for key in entries if fold(key) == fold(name)), None)
        if match is None:
            message = f"there is no '{name}' to remove.{nearest(name, entries)}{known(entries)}"
            return [Line(value.place, message, names[: depth + 1])]
        node = entries[match].node
    return []


def absolute_starts(tree: Table) -> tuple[Table, dict[str, Found], list[Line]]:
    """`tree` with the paths under `start` made absolute, in `with` too; the files they name; those that name none."""
    files: dict[str, Found] = {}
    lines: list[Line] = []

    def absolute(level: str, entry: Entry) -> Entry:
        place, value = entry.node.place, plain(entry.node)
        if not isinstance(value, str):
            return entry
        try:
            found = find(value, place.folder, os.path.dirname(place.file) if place.line else "")
        except SpecError as error:
            lines.append(Line(place, str(error), ("start", level)))
            return entry
        files[str(found.path)] = found
        return Entry(entry.key, Leaf(place, str(found.path)))

    def in_start(level: str, entry: Entry) -> Entry:
        if not isinstance(entry.node, Table):
            return absolute(level, entry)

        def in_pair(key: str, part: Entry) -> Entry:
            if key == "with" and isinstance(part.node, Table):
                return Entry(part.key, in_graph(part.node))
            return absolute(level, part) if key == "graph" else part

        return Entry(entry.key, mapped(entry.node, in_pair))

    def in_graph(graph: Table) -> Table:
        def change(key: str, entry: Entry) -> Entry:
            starts = key == "start" and isinstance(entry.node, Table)
            return Entry(entry.key, mapped(entry.node, in_start)) if starts and isinstance(entry.node, Table) else entry

        return mapped(graph, change)

    return in_graph(tree), files, lines

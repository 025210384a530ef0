"""A graph file, with overrides, to a `Spec`; every mistake of the file and of the graphs it starts from at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast, final

from mlo.spec import _check
from mlo.spec._compose import absolute_starts, overridden, read_graph
from mlo.spec._faults import Broken, Line, fail, unknown
from mlo.spec._files import Found, find, show
from mlo.spec._frozen import Frozen
from mlo.spec._merge import merged, without_nulls
from mlo.spec._models import Origin, Spec
from mlo.spec._nodes import Entry, KeyPath, Leaf, Node, Table, fold, is_choice, locate, plain, single
from mlo.spec._problems import problem_named
from mlo.spec._registry import canonical

_SHARED = (("seed", 0), ("device", "cpu"), ("dtype", "float32"))
"""What a graph passes on to the graphs it starts from, with the values it has when it says nothing."""

_LONGEST = 16
"""Graphs that start from each other; a paper has two or three."""


@final
@dataclass(frozen=True)
class _Reading:
    """One graph on its way to a spec: its file, what problems there are, and the graphs that start from it."""

    found: Found
    imports: tuple[str, ...]
    above: tuple[tuple[str, str], ...] = ()  # file and changes of each


def load(path: str | PathLike[str], *overrides: str, imports: Sequence[str] = ()) -> Spec:
    """Read, merge and check a graph: `load("graphs/mgr.yaml", "seed=1")`.

    - `path`: a file, or the name of a graph that comes with mlo (`needs_aware`, `needs_aware/gan`).
    - `overrides`: `key=value`, the value in YAML, by the rules of `extends`; `null` removes.
    - `imports`: modules that a problem may come from besides the known ones.

    Imports neither torch nor any problem. Raises `SpecError` with every mistake, each with its place.
    """
    found = find(str(path))
    try:
        tree, lines = read_graph(found)
    except Broken as broken:
        fail([broken.line])
    tree, more = overridden(tree, overrides)
    spec, rest = _resolve(tree, _Reading(found, tuple(imports)))
    return _sound(spec, [*lines, *more, *rest])


def _sound(spec: Spec | None, lines: list[Line]) -> Spec:
    if lines or spec is None:
        fail(lines)
    return spec


def _reload(tree: Table, reading: _Reading, overrides: Sequence[str]) -> Spec:
    tree, lines = overridden(tree, overrides)
    spec, rest = _resolve(tree, reading)
    return _sound(spec, [*lines, *rest])


def _resolve(composed: Table, reading: _Reading) -> tuple[Spec | None, list[Line]]:
    """The spec of a composed tree, or None, and what is wrong with it and with the graphs it starts from."""
    composed, files, lines = absolute_starts(composed)
    tree = without_nulls(composed)
    written = cast("dict[str, Any]", plain(_canonical(tree, reading.imports)))
    data = {"name": reading.found.path.stem, **written}
    faults = _check.faults(tree, data, reading.imports)
    lines += [Line(locate(tree, each.path, key=each.on_key), each.message, each.path) for each in faults]
    strays = _check.stray_nulls(composed)
    lines += [Line(locate(composed, each.path, key=each.on_key), each.message, each.path) for each in strays]
    starts, more = _starts(tree, files, reading)
    lines += more
    if lines:
        return None, lines
    again = partial(_reload, composed, reading)
    return Spec.of(_check.with_names(data), Origin(Frozen(starts), reading.imports, tree, again)), []


def _canonical(tree: Table, imports: Sequence[str]) -> Table:
    """`tree` with the names of problem, optimizers and methods in their published spelling."""

    def change(table: Table, path: KeyPath) -> Table:
        entries: dict[str, Entry] = {}
        for key, entry in table.entries.items():
            here, node = (*path, key), entry.node
            if is_choice(here) and key in ("optimizer", "hypergradient"):
                node = _renamed(key, node)
            elif isinstance(node, Table) and (key == "levels" or path == ("levels",)):
                node = change(node, here)
            elif here == ("problem",) and isinstance(node, Leaf) and isinstance(node.value, str):
                node = replace(node, value=problem_named(node.value, imports) or node.value)
            entries[key] = replace(entry, node=node)
        return Table(table.place, entries)

    return change(tree, ())


def _renamed(key: str, node: Node) -> Node:
    choice = single(node)
    if choice is not None:
        return Table(node.place, {canonical(key, choice[0]): choice[1]})
    return (
        replace(node, value=canonical(key, node.value))
        if isinstance(node, Leaf) and isinstance(node.value, str)
        else node
    )


def _starts(tree: Table, files: Mapping[str, Found], reading: _Reading) -> tuple[dict[str, Spec], list[Line]]:
    """The specs of the graphs that levels start from, by level; levels that name the same one share it."""
    starts, levels = tree.get("start"), tree.get("levels")
    known = list(levels.entries) if isinstance(levels, Table) else []
    made: dict[tuple[str, str], Spec | None] = {}
    specs: dict[str, Spec] = {}
    lines: list[Line] = []
    for level, entry in starts.entries.items() if isinstance(starts, Table) else ():
        path = ("start", level)
        if known and level not in known:
            lines.append(Line(entry.key, unknown("level", level, known), path))
        graph, changes = _graph_and_changes(entry.node)
        if graph is None or str(graph.value) not in files:
            continue  # reported where the path was looked up, or by the model
        identity = (str(graph.value), json.dumps(plain(changes), sort_keys=True, default=repr))
        if identity in reading.above:
            again = reading.above[reading.above.index(identity) :]
            cycle = " → ".join(show(Path(name)) for name, _ in (*again, identity))
            lines.append(Line(graph.place, f"graphs start from each other in a cycle: {cycle}.", path))
            continue
        if len(reading.above) >= _LONGEST:
            lines.append(Line(graph.place, f"more than {_LONGEST} graphs start from each other.", path))
            continue
        if identity not in made:
            found = files[identity[0]]
            here = (*reading.above, identity)
            made[identity], more = _started(tree, found, changes, replace(reading, found=found, above=here))
            lines += more
        spec = made[identity]
        if spec is not None and level in known and level not in spec.levels:
            lines.append(Line(graph.place, f"{files[identity[0]].shown}: {unknown('level', level, spec.levels)}", path))
        elif spec is not None:
            specs[level] = spec
    return specs, lines


def _graph_and_changes(node: Node) -> tuple[Leaf | None, Table]:
    empty = Table(node.place, {})
    graph = node.get("graph") if isinstance(node, Table) else node
    changes = node.get("with") if isinstance(node, Table) else None
    return graph if isinstance(graph, Leaf) else None, changes if isinstance(changes, Table) else empty


def _started(upper: Table, found: Found, changes: Table, reading: _Reading) -> tuple[Spec | None, list[Line]]:
    """The graph in `found`, with what it inherits from `upper` and with `changes` on top."""
    try:
        tree, lines = read_graph(found)
    except Broken as broken:
        return None, [broken.line]
    shared = {key: upper.entries.get(key, Entry(upper.place, Leaf(upper.place, default))) for key, default in _SHARED}
    given = upper.get("data")
    if given is not None and _problem(tree) == _problem(upper):
        shared["data"] = upper.entries["data"]
    elif isinstance(given, Table) and (passed := _inherited(tree, given)).entries:
        shared["data"] = Entry(upper.entries["data"].key, passed)
    tree = merged(merged(tree, Table(tree.place, shared)), changes)
    spec, more = _resolve(tree, reading)
    return spec, [*lines, *more]


def _inherited(tree: Table, given: Table) -> Table:
    """Of the settings `given`, those that the graph in `tree` takes over under another problem."""
    written = tree.get("inherits")
    names: object = None if written is None else plain(written)
    listed = cast("Sequence[object]", names) if isinstance(names, list | tuple) else [names]
    wanted = {fold(name) for name in listed if isinstance(name, str)}
    return Table(given.place, {key: entry for key, entry in given.entries.items() if fold(key) in wanted})


def _problem(tree: Table) -> str:
    return fold(str(plain(node))) if (node := tree.get("problem")) is not None else ""

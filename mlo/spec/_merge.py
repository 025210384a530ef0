"""How a graph that extends another, or an override, changes what is there.

Mappings merge key by key; lists and single values replace; `null` removes. A choice (`name` or `{name: {option: value}}`)
that names another name replaces the old one whole; the same name merges, so that `sgd` over `{sgd: {momentum: 0.9}}`
keeps the momentum. Inside the options of a choice a mapping with a single key, such as a schedule, counts as a choice too;
an optimizer's option that is read from a level, `{level: rates, name: …}`, merges with another and replaces anything else.
"""

from __future__ import annotations

from dataclasses import replace

from mlo.spec._nodes import Entry, KeyPath, Leaf, Node, Table, fold, is_choice, single


def merged(base: Table, over: Table, *, keep_nulls: bool = False, path: KeyPath = ()) -> Table:
    """`base` changed by `over`. Each value keeps the place where it was written.

    A `null` that removes nothing stays, for `without_nulls` to judge; with `keep_nulls` all of them do: merging one set
    of changes (`with`) into another must not forget what the result is to remove.
    """
    entries = dict(base.entries)
    for key, entry in over.entries.items():
        before = entries.get(key)
        if before is None:
            entries[key] = entry
        elif is_null(entry.node) and not keep_nulls:
            del entries[key]
        else:
            node = _merged(before.node, entry.node, (*path, key), keep_nulls=keep_nulls)
            both = isinstance(before.node, Table) and isinstance(entry.node, Table)
            entries[key] = Entry(before.key if both else entry.key, node)
    return Table(base.place, entries)


def is_null(node: Node) -> bool:
    """Whether `node` is YAML's `null`."""
    return isinstance(node, Leaf) and node.value is None


def is_option(path: KeyPath) -> bool:
    """Whether `path` leads to the value of an option of a choice, at whatever depth: `levels.x.optimizer.sgd.momentum`."""
    return len(path) >= 5 and len(path) % 2 == 1 and is_choice(path[:3])


def _merged(base: Node, over: Node, path: KeyPath, *, keep_nulls: bool) -> Node:
    if is_choice(path) or is_option(path):
        return _merged_choice(base, over, path, keep_nulls=keep_nulls)
    if len(path) == 2 and path[0] == "start":
        base = _as_table(base) if isinstance(over, Table) else base
    if not (isinstance(base, Table) and isinstance(over, Table)):
        return over
    if len(path) == 3 and path[0] == "start" and path[2] == "with":
        return merged(base, over, keep_nulls=True)  # a graph of changes: its own rules start again at its top
    return merged(base, over, path=path, keep_nulls=keep_nulls)


def _as_table(node: Node) -> Node:
    """`start: {level: path}` is short for `{graph: path}`."""
    return Table(node.place, {"graph": Entry(node.place, node)}) if isinstance(node, Leaf) else node


def _merged_choice(base: Node, over: Node, path: KeyPath, *, keep_nulls: bool) -> Node:
    if path[2] == "optimizer" and is_option(path) and (_is_read(base) or _is_read(over)):
        if isinstance(base, Table) and isinstance(over, Table) and {*base.entries, *over.entries} <= {"level", "name"}:
            return merged(base, over, path=path, keep_nulls=keep_nulls)
        return over
    before, after = _name_and_options(base), _name_and_options(over)
    if before is None or after is None:
        several = is_option(path) and not (single(base) and single(over))
        if several and isinstance(base, Table) and isinstance(over, Table):  # a mapping of several keys is no choice
            return merged(base, over, path=path, keep_nulls=keep_nulls)
        return over
    if fold(before[0]) != fold(after[0]):
        return over
    if after[1] is None:
        return base if before[1] is not None else over
    if before[1] is None:
        return over
    name, entry = after[0], single(over)
    assert entry is not None, "options stand below a single key"
    options = merged(before[1], after[1], path=(*path, name), keep_nulls=keep_nulls)
    return Table(over.place, {name: replace(entry[1], node=options)})


def _is_read(node: Node) -> bool:
    """Whether an option is read from a level: `{level: rates, name: learning_rate}`."""
    return isinstance(node, Table) and isinstance(node.get("level"), Leaf)


def _name_and_options(node: Node) -> tuple[str, Table | None] | None:
    """A choice's name and options; None for what is no choice."""
    if isinstance(node, Leaf) and isinstance(node.value, str):
        return node.value, None
    entry = single(node)
    if entry is None or not (isinstance(entry[1].node, Table) or is_null(entry[1].node)):
        return None
    return entry[0], entry[1].node if isinstance(entry[1].node, Table) else None


def without_nulls(table: Table, path: KeyPath = ()) -> Table:
    """`table` without the keys that are `null`: they remove, and what they removed is gone. `with` stays as written.

    A choice without options, `unroll:` with nothing after it, becomes its name.
    """
    entries: dict[str, Entry] = {}
    for key, entry in table.entries.items():
        here = (*path, key)
        node = entry.node
        if is_null(node):
            continue
        name = single(node) if is_choice(here) or is_option(here) else None
        if name is not None and is_null(name[1].node):
            node = Leaf(name[1].key, name[0])
        elif isinstance(node, Table) and not (len(here) == 3 and here[0] == "start" and here[2] == "with"):
            node = without_nulls(node, here)
        entries[key] = Entry(entry.key, node)
    return Table(table.place, entries)

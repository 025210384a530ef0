"""YAML text → a tree of places, by the scalar rules of YAML 1.2 (the core schema).

PyYAML reads YAML 1.1, where `1e-3` is text, `on` is true, `010` is eight and `12:30` is seven hundred and fifty. Here
`1e-3` is a number and `on`, `off`, `yes` and `no` are text. `010` means eight to one reader of YAML and ten to another, so
it is refused. Tags other than those of plain values, merge keys (`extends` says it better) and keys that are not text
are refused too. Aliases are expanded up to a bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError
from yaml.resolver import BaseResolver

from mlo.spec._faults import Broken, Line
from mlo.spec._nodes import Entry, Leaf, Node, Place, Series, Table

DEEPEST = 64
"""Mappings and lists inside each other."""
LARGEST = 50_000
"""Values in one file once aliases are expanded; a graph has hundreds."""

_TAG = "tag:yaml.org,2002:"
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


def _core(resolver: type[BaseResolver]) -> None:
    """Give a loader or dumper the scalars of YAML 1.2; a dumper quotes the text a loader would read as something else."""
    resolver.yaml_implicit_resolvers = {}
    for name, pattern, first in _RESOLVERS:
        letters = [*first, ""] if name == "null" else list(first)
        resolver.add_implicit_resolver(_TAG + name, re.compile(rf"(?:{pattern})\Z"), letters)


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with YAML 1.2 scalars and a bound on depth (its recursion would end in a stack overflow)."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, f"nested deeper than {DEEPEST}", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class Dumper(yaml.SafeDumper):
    """Writes what this module reads back unchanged."""

    def ignore_aliases(self, data: Any) -> bool:  # a shared tuple is no reason to write `&id001`
        return True


_core(_Loader)
_core(Dumper)


def read(text: str, file: str, folder: str) -> tuple[Table, list[Line]]:
    """The mapping written in `text`, and what is wrong with it; raises `Broken` where it is no mapping at all."""
    node, lines = read_value(text, Place(file, 1, 1, folder))
    match node:
        case Table():
            return node, lines
        case Leaf(value=None):
            raise Broken(node.place, "the file is empty: a graph needs at least `problem` and `levels`.")
        case Leaf():
            raise Broken(node.place, "expected a mapping of keys at the top, got a single value.")
        case Series():
            raise Broken(node.place, "expected a mapping of keys at the top, got a list.")


def read_value(text: str, start: Place) -> tuple[Node, list[Line]]:
    """Any YAML value; a `start` without a line gives its own place to everything (an override is one place)."""
    try:
        # SafeLoader is the base: only the composer runs, so no tag ever constructs an object.
        root: yaml.Node | None = yaml.compose(text, Loader=_Loader)  # type: ignore[reportUnknownMemberType]
    except ReaderError as error:
        place = _at(start, *_line_and_column(text, int(error.position)))
        raise Broken(place, f"not valid YAML: the character {chr(error.character)!r} is not allowed.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _at(start, mark.line, mark.column) if mark else start
        raise Broken(place, f"not valid YAML: {_reason(error)}.") from error
    if root is None:
        return Leaf(start, None), []
    converter = _Converter(start)
    node = converter.node(root)
    return node, converter.lines


def _at(start: Place, line: int, column: int) -> Place:
    return Place(start.file, line + 1, column + 1, start.folder) if start.line else start


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n"), position - (before.rfind("\n") + 1)


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "it cannot be read")
    if "'\\t'" in problem:
        return "a tab; YAML indents with spaces"
    if problem == "mapping values are not allowed here":
        return "a second ': ' in one line; quote the text or start a new line"
    context = f" {error.context}" if error.context and error.problem else ""
    return f"{problem}{context}"


@final
@dataclass
class _Converter:
    """PyYAML's nodes to ours: expands aliases and collects what is wrong on the way."""

    start: Place
    lines: list[Line] = field(default_factory=list[Line])
    count: int = 0
    open: list[int] = field(default_factory=list[int])

    def node(self, node: yaml.Node) -> Node:
        place = self.place(node)
        self.count += 1
        if self.count > LARGEST:
            raise Broken(place, f"more than {LARGEST} values once aliases are expanded.")
        if id(node) in self.open:
            raise Broken(place, "an alias stands inside the value it names.")
        if len(self.open) >= DEEPEST:
            raise Broken(place, f"nested deeper than {DEEPEST} once aliases are expanded.")
        self.open.append(id(node))
        try:
            return self.convert(node, place)
        finally:
            self.open.pop()

    def convert(self, node: yaml.Node, place: Place) -> Node:
        kinds: dict[type[yaml.Node], tuple[str, ...]] = {yaml.SequenceNode: ("seq",), yaml.MappingNode: ("map",)}
        allowed = kinds.get(type(node), ("null", "bool", "int", "float", "str", "merge"))
        if node.tag not in [_TAG + name for name in allowed]:
            tag = str(node.tag).replace(_TAG, "!!")
            self.wrong(place, f"the tag {tag} is not supported; write the value without it.")
            return Leaf(place, None)
        if isinstance(node, yaml.MappingNode):
            return self.table(node, place)
        if isinstance(node, yaml.SequenceNode):
            items: Sequence[yaml.Node] = node.value
            return Series(place, tuple(self.node(item) for item in items))
        return Leaf(place, self.scalar(str(node.tag).removeprefix(_TAG), str(node.value), place))

    def table(self, node: yaml.MappingNode, place: Place) -> Table:
        entries: dict[str, Entry] = {}
        pairs: Sequence[tuple[yaml.Node, yaml.Node]] = node.value
        for key_node, value_node in pairs:
            at = self.place(key_node)
            value = self.node(value_node)
            key: object = key_node.value
            if key_node.tag == _TAG + "merge":
                self.wrong(at, "merge keys (`<<`) are not supported; use `extends`, or repeat the keys.")
            elif not isinstance(key, str) or key_node.tag != _TAG + "str":
                shown = f"'{key}' is" if isinstance(key, str) else "a list or mapping is"
                self.wrong(at, f"keys are names, and {shown} not; quote it if it is meant as text.")
            elif self.scalar("str", key, at) is None:
                continue
            elif key in entries:
                first = entries[key].key
                where = f"line {first.line}" if first.line else "the same override"
                self.wrong(at, f"the key '{key}' is written twice; the first is in {where}.")
            else:
                entries[key] = Entry(at, value)
        return Table(place, entries)

    def scalar(self, kind: str, text: str, place: Place) -> str | int | float | bool | None:
        match kind:
            case "null":
                return None
            case "bool" if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case "int":
                return self.integer(text, place)
            case "float":
                return self.real(text, place)
            case "str" | "merge" if _SURROGATE.search(text):
                self.wrong(place, "an escape that is half a character (\\ud800 to \\udfff).")
                return None
            case "str" | "merge":
                return text
            case _:
                self.wrong(place, f"'{text}' is not a {kind}.")
                return None

    def integer(self, text: str, place: Place) -> int | None:
        if _LEADING_ZERO.fullmatch(text):
            bare = text.lstrip("+-0") or "0"
            self.wrong(
                place, f"{text} is {bare} to some readers of YAML and octal to others: write {bare} or '{text}'."
            )
            return None
        try:
            return int(text, 0)
        except ValueError:
            self.wrong(place, f"'{text[:40]}' is not a whole number that can be read.")
            return None

    def real(self, text: str, place: Place) -> float | None:
        infinite = text.lower().lstrip("+-") == ".inf"
        try:
            number = (
                math.inf * (-1 if text[0] == "-" else 1) if infinite else float(text.lower().replace(".nan", "nan"))
            )
        except ValueError:
            self.wrong(place, f"'{text[:40]}' is not a number.")
            return None
        if math.isnan(number) or (math.isinf(number) and not infinite):
            self.wrong(place, f"{text} is no number that can be computed with.")
            return None
        return number

    def place(self, node: yaml.Node) -> Place:
        mark: yaml.Mark = node.start_mark
        return _at(self.start, mark.line, mark.column)

    def wrong(self, place: Place, message: str) -> None:
        self.lines.append(Line(place, message))

"""What is wrong with a specification, and the lines that say so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, final

from mlo._errors import SpecError, nearest
from mlo.spec._nodes import KeyPath, Place, dotted


class Fault(NamedTuple):
    """Something wrong with what stands at `path`, or with the key itself."""

    path: KeyPath
    message: str
    on_key: bool = False

    def below(self, path: KeyPath) -> Fault:
        """The same fault, seen from further up: `path` leads to where this one starts."""
        return self._replace(path=(*path, *self.path))


@final
@dataclass(frozen=True)
class Line:
    """A fault whose place is known, as it is printed."""

    place: Place
    message: str
    path: KeyPath = ()

    def __str__(self) -> str:
        return f"{self.place}: {dotted(self.path)}: {self.message}" if self.path else f"{self.place}: {self.message}"


@final
class Broken(Exception):
    """A file or an override that cannot be read at all: there is nothing to look for further mistakes in."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.line = Line(place, message)


def fail(lines: Iterable[Line]) -> NoReturn:
    """Raise one `SpecError` with every distinct line, in the order of the file; overrides come last."""
    ordered = sorted(lines, key=lambda line: (not line.place.line, line.place.file, line.place.line, line.place.column))
    raise SpecError("\n".join(dict.fromkeys(map(str, ordered))))


def known(names: Iterable[str]) -> str:
    """The second line of a message: `Known: a, b, c.`"""
    listed = ", ".join(sorted(names))
    return f"\n  Known: {listed}." if listed else ""


def unknown(what: str, name: str, names: Iterable[str]) -> str:
    """`no optimizer named 'sdg'. Did you mean 'sgd'?` and the names there are."""
    names = list(names)
    return f"no {what} named '{name}'.{nearest(name.lower(), names)}{known(names)}"


def expected(form: str, value: object) -> str:
    """`expected a number, got 'fast'`."""
    return f"expected {form}, got {shown(value)}"


def kind_of(value: object) -> str:
    """What sort of thing a function has given, for a message: `a tensor`, `None`, `an int`."""
    if value is None:
        return "None"
    name = type(value).__name__
    name = name.lower() if name == "Tensor" else name
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def shown(value: Any) -> str:
    """A value the way YAML writes it, cut where it grows long."""
    text = _shown(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case Mapping():
            pairs: Mapping[Any, Any] = value
            return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in pairs.items()) + "}"
        case tuple() | list():
            items: Iterable[Any] = value
            return "[" + ", ".join(map(_shown, items)) + "]"
        case _:
            return repr(value)


def first_name(error: Exception) -> str:
    """The setting that a message begins with: `width is 0; …`, `'width': …`, `width=0: …`."""
    found = re.match(r"[`'\"]?(\w+)", str(error))
    return found[1] if found else ""

"""Where graphs are found: a path, relative to where it was written, or the name of one that ships with mlo."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from mlo._errors import SpecError, nearest
from mlo.spec._faults import Broken, known
from mlo.spec._nodes import Place

_PACKAGE = Path(__file__).resolve().parents[1]
_ENDING = ".yaml"


@final
@dataclass(frozen=True)
class Found:
    """A graph's file: its absolute path, and the way it is shown in messages."""

    path: Path
    shown: str


def shipped_graphs() -> dict[str, Path]:
    """The graphs that come with mlo, by name: `needs_aware`, `needs_aware/gan`."""
    for folder in (_PACKAGE / "graphs", _PACKAGE.parent / "graphs"):  # a wheel, a checkout
        if folder.is_dir():
            files = sorted(folder.rglob(f"*{_ENDING}"))
            return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {}


def find(text: str, folder: str = ".", shown_in: str = "") -> Found:
    """The file that `text`, written in `folder`, names; `shown_in` is that folder as messages show it.

    Raises `SpecError`, without a place, where there is none or it cannot be a graph.
    """
    here = Path(folder, text)
    for candidate in (here, here.with_name(here.name + _ENDING)) if here.name else ():
        if candidate.is_file():
            shown = os.path.normpath(os.path.join(shown_in, text)) if shown_in else text
            shown += candidate.name[len(here.name) :]
            return Found(Path(os.path.abspath(candidate)), shown)
    shipped = shipped_graphs()
    match = shipped.get(text.removesuffix(_ENDING))
    if match is not None:
        return Found(match, show(match))
    if here.is_dir():
        inside = [file.name for file in here.glob(f"*{_ENDING}")]
        raise SpecError(f"'{text}' is a folder, and a graph is a file.{known(inside)}")
    beside = [os.path.join(os.path.dirname(text), file.name) for file in here.parent.glob(f"*{_ENDING}")]
    top = [name for name in shipped if "/" not in name]
    raise SpecError(f"no graph '{text}'.{nearest(text, [*beside, *shipped])}{known([*beside, *top])}")


def show(path: Path) -> str:
    """Relative to the working directory if it is inside it, absolute otherwise."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def text_of(found: Found) -> str:
    """The file as text. Raises `Broken` where it is not UTF-8 or cannot be read."""
    try:
        data = found.path.read_bytes()
    except OSError as error:
        raise Broken(Place(found.shown), f"cannot be read: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, start = before.count(b"\n") + 1, before.rfind(b"\n") + 1
        column = len(before[start:].decode("utf-8", errors="replace")) + 1
        raise Broken(Place(found.shown, line, column), "not valid UTF-8; save the file as UTF-8.") from error

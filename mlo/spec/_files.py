"""Where graphs are found: a path, relative to where it was written, or the name of one that ships with mlo.

A path may lead anywhere: a baseline extends the graph in the folder above it. What it may not do is read something else:
only regular files that end in `.yaml` or `.yml` and are no larger than `LARGEST_FILE` are opened, so that `extends` cannot
quote a private file in a message, wait for a device, or fill the memory. `~` and `$HOME` are names like others.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from mlo._errors import SpecError, nearest
from mlo.spec._faults import Broken, known
from mlo.spec._nodes import Place

_PACKAGE = Path(__file__).resolve().parents[1]
_ENDING = ".yaml"
_ENDINGS = (_ENDING, ".yml")
LARGEST_FILE = 2**20
"""Bytes of one file; a graph has a few thousand."""


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
        if _is_file(candidate):
            if candidate.suffix not in _ENDINGS:
                raise SpecError(f"'{text}' is no graph: a graph's file ends in {' or '.join(_ENDINGS)}.")
            shown = os.path.normpath(os.path.join(shown_in, text)) if shown_in else text
            shown += candidate.name[len(here.name) :]
            return Found(Path(os.path.abspath(candidate)), shown)
    shipped = shipped_graphs()
    match = shipped.get(text.removesuffix(_ENDING))
    if match is not None:
        return Found(match, show(match))
    if _is_file(here, folder=True):
        inside = [file.name for file in here.glob(f"*{_ENDING}")]
        raise SpecError(f"'{text}' is a folder, and a graph is a file.{known(inside)}")
    near = here.parent.glob(f"*{_ENDING}") if _is_file(here.parent, folder=True) else ()
    beside = [os.path.join(os.path.dirname(text), file.name) for file in near]
    top = [name for name in shipped if "/" not in name]
    raise SpecError(f"no graph '{text}'.{nearest(text, [*beside, *shipped])}{known([*beside, *top])}")


def _is_file(path: Path, *, folder: bool = False) -> bool:
    """Whether there is a regular file (a folder); a name too long for one is none."""
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def show(path: Path) -> str:
    """Relative to the working directory if it is inside it, absolute otherwise."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def text_of(found: Found) -> str:
    """The file as text. Raises `Broken` where it is not UTF-8 or cannot be read."""
    try:
        with found.path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise Broken(Place(found.shown), f"cannot be read: {error.strerror or error}.") from error
    if len(data) > LARGEST_FILE:
        raise Broken(Place(found.shown), "more than 1 MiB: a graph has a few kilobytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, start = before.count(b"\n") + 1, before.rfind(b"\n") + 1
        column = len(before[start:].decode("utf-8", errors="replace")) + 1
        raise Broken(Place(found.shown, line, column), "not valid UTF-8; save the file as UTF-8.") from error

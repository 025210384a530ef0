"""The files of a run folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from mlo._errors import MachineError, UserError

LOCK = ".lock"


@final
class Refused(UserError):
    """What lies in a run folder cannot be gone on from; the message says why, and what can be done."""


@final
class Held(UserError):
    """Another process is working there: `who` says which."""

    def __init__(self, message: str, who: str) -> None:
        super().__init__(message)
        self.who = who


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: a reader, or a crash, sees the old contents or the new, never a part.

    Both the contents and the name are on the disk when this returns.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_names(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as indented JSON, in one step; a number that JSON has no word for (NaN, an infinity) becomes null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def finite(value: Any) -> Any:
    """`value` with None in place of every number that is not finite."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            table: Mapping[Any, Any] = value
            return {key: finite(each) for key, each in table.items()}
        case list() | tuple():
            items: Iterable[Any] = value
            return [finite(each) for each in items]
        case _:
            return value


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left half written in `folder`."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def run_folder(path: Path) -> Path:
    """Make the run folder `path`; what `new_folder` refuses may be a run to go on with."""
    unfinished = (path / "spec.yaml").is_file() and not (path / "summary.json").is_file()
    return new_folder(path, "a run folder", f", or go on with it: python -m mlo resume {path}" if unfinished else "")


def new_folder(path: Path, what: str, otherwise: str = "") -> Path:
    """Make the folder `path`. Raises `UserError` if something is in it already, `MachineError` if it cannot be.

    - `what`: what it is to be, for the message, which ends in `otherwise`.
    """
    if path.exists() and (not path.is_dir() or any(each.name != LOCK for each in path.iterdir())):
        raise UserError(f"{path}: {what} must be new or empty; choose another with --out{otherwise}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{path}: cannot be made: {error.strerror}") from None
    return path


def _sync_names(folder: Path) -> None:
    if os.name == "nt":  # there a folder cannot be opened, and a replaced name is durable
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

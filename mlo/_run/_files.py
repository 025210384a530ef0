"""The files of a run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlo._errors import MachineError, UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: a reader, or a crash, sees the old contents or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as indented JSON, in one step."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def new_folder(path: Path) -> Path:
    """Make the run folder `path`. Raises `UserError` if something is in it already, `MachineError` if it cannot be."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: a run folder must be new or empty; choose another with --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{path}: cannot be made: {error.strerror}") from None
    return path

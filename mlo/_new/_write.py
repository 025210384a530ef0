"""The files of a new problem, from templates."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path

from mlo._errors import MachineError, UserError

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FILES = {"problem.py.txt": "{}.py", "graph.yaml.txt": "{}.yaml", "test.py.txt": "test_{}.py"}


def new(name: str, folder: Path) -> list[Path]:
    """Write `name`.py, `name`.yaml and test_`name`.py into `folder`; the paths of the files.

    Raises `UserError`, before anything is written, for a name that cannot be a module of its own, and where one of the
    files is there already; `MachineError` where the folder cannot be made.
    """
    _check(name, folder)
    made = {folder / pattern.format(name): template for template, pattern in _FILES.items()}
    there = [str(path) for path in made if path.exists()]
    if there:
        raise UserError(f"{', '.join(there)}: there already, and nothing is overwritten; choose another name or --in")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made: {error.strerror}") from None
    for path, template in made.items():
        text = files("mlo._new").joinpath("templates", template).read_text(encoding="utf-8")
        with path.open("x", encoding="utf-8") as file:  # never over one that appeared meanwhile
            file.write(text.replace("NAME", name))
    return list(made)


def _check(name: str, folder: Path) -> None:
    if not _NAME.fullmatch(name) or name.startswith("test_"):
        raise UserError(f"'{name}': a problem's name is a word of a-z, 0-9 and _ that starts with a letter, not test_")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise UserError(f"'{name}' is a word of Python's; choose another name")
    found = importlib.util.find_spec(name)
    own = found is not None and found.origin and Path(found.origin).resolve() == (folder / f"{name}.py").resolve()
    if found is not None and not own:
        raise UserError(f"'{name}' is the name of a module that is installed; choose another name")

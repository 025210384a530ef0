"""What `resume` must know beside the specification: `run.json`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch

import mlo
from mlo._run._files import Refused, write_json

_FORMAT = 1
_FILE = "run.json"


@final
@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """How a run was started.

    - `spec_hash`: of the specification it was started with.
    - `imports`: the modules given by --import, and the folder each was found in.
    - `threads`: CPU threads of one operation.
    - `cache`: where the runs that levels start from are kept.
    - `versions`: of what computes the numbers.
    - `processes`: among how many each batch was divided.
    - `resumed`: for each time it went on: from which iteration, where, with what, and whether that is exact.
    """

    spec_hash: str
    imports: Mapping[str, str | None]
    threads: int
    cache: str
    versions: Mapping[str, str | None]
    processes: int = 1
    resumed: Sequence[Mapping[str, Any]] = ()

    def write(self, folder: Path) -> None:
        """Put it in `folder`."""
        write_json(folder / _FILE, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """What `folder` holds. Raises `Refused` if it holds none, or one that cannot be understood."""
        path = folder / _FILE
        try:
            found = json.loads(path.read_bytes())
            if found.pop("format") != _FORMAT:
                raise Refused(f"{path}: written in another format than {_FORMAT}, which this version of mlo reads")
            return cls(**found)
        except FileNotFoundError:
            raise Refused(f"{folder}: cannot be resumed: {_FILE} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path}: damaged: {error}") from None


def read_imports(folder: Path) -> tuple[str, ...]:
    """The modules that the run in `folder` was given, each of which can be imported afterwards."""
    try:
        imports = RunRecord.read(folder).imports
    except Refused:  # of an older version, or copied without it: shipped problems need none
        return ()
    for module, place in imports.items():
        if place is not None and find_spec(module.partition(".")[0]) is None:
            sys.path.append(place)
    return tuple(imports)


def place_of(module: str) -> str | None:
    """The folder on the path that `module` was imported from."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    depth = module.count(".") + (1 if path.name == "__init__.py" else 0)
    return str(path.parents[depth])


def versions() -> dict[str, str | None]:
    """Of what computes the numbers. Torch's own says what it was built for, which that of its package need not."""
    packages = {"mlo": _version("mlo"), "torch": str(torch.__version__), "numpy": _version("numpy")}
    return packages | {"python": platform.python_version()}


def git_commit() -> str | None:
    """The commit of the checkout that `mlo` runs from; None for an installed package."""
    root = Path(mlo.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

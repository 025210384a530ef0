"""What several commands are given, and how it is said in `--help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mlo._errors import UserError

GraphArgument = Annotated[
    str, typer.Argument(metavar="GRAPH", help="A YAML file, or the name of a shipped graph such as needs_aware.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the graph: seed=1 levels.meta.every=4."),
]
Imports = Annotated[
    list[str] | None, typer.Option("--import", metavar="MODULE", help="A module of your own that is a problem.")
]
Seed = Annotated[int | None, typer.Option(help="The same as seed=N.")]
Device = Annotated[str | None, typer.Option(help="The same as device=D.")]


def with_options(overrides: list[str] | None, seed: int | None = None, device: str | None = None) -> list[str]:
    """All changes to the graph, in the order in which they apply."""
    found = list(overrides or ())
    found += [] if seed is None else [f"seed={seed}"]
    return found + ([] if device is None else [f"device={device}"])


def modules(imports: Sequence[str] | None) -> tuple[str, ...]:
    """The modules of `--import`, which may lie in the working directory however `mlo` was started.

    Raises `UserError` for one that does not exist.
    """
    if imports and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    for module in imports or ():
        if module.endswith(".py"):
            raise UserError(f"--import {module}: write --import {'.'.join(Path(module).with_suffix('').parts)}")
        if not _exists(module):
            raise UserError(f"--import {module}: there is no such module")
    return tuple(imports or ())


def _exists(module: str) -> bool:
    """Whether there is such a module; of one inside a package, only whether there is the package, which stays unread."""
    if module in sys.modules:
        return True
    try:
        return find_spec(module.partition(".")[0]) is not None
    except ValueError:  # an empty name, or a module that hides where it comes from
        return False

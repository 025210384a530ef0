"""`mlo new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A word of a-z, 0-9 and _: the module's name.")],
    folder: Annotated[Path, typer.Option("--in", metavar="DIR", help="Where the files go.")] = Path(),
) -> None:
    """Write a problem, a graph and a test that run as they are, commented as a lesson, for you to change."""
    from mlo._new import new as write

    for path in write(name, folder):
        typer.echo(f"wrote {path}")
    inside = "" if folder == Path() else f"cd {folder} && "
    typer.echo(f"run it:  {inside}python -m mlo run {name}.yaml --import {name}")
    typer.echo(f"test it: {inside}python -m pytest test_{name}.py")

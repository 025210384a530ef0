"""`mlo export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mlo.cli._arguments import modules


class Which(StrEnum):
    """The checkpoints of a run."""

    SELECTED = "selected"
    LATEST = "latest"


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    out: Annotated[Path | None, typer.Option(help="A new folder; DIR/export if not given.")] = None,
    which: Annotated[Which, typer.Option(help="The checkpoint to export.")] = Which.SELECTED,
) -> None:
    """Write what a run has trained as safetensors files for plain PyTorch, and a JSON that says how to load them."""
    from mlo._run import open_run

    spec = open_run(folder).spec
    modules(spec.imports)
    from mlo._export import export as write

    made = write(folder, out, which=which.value)
    typer.echo(f"wrote {len(spec.levels)} levels and export.json to {made}")

"""`mlo show`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mlo.cli._arguments import GraphArgument, Imports, Overrides, modules, with_options
from mlo.cli._output import put


class Format(StrEnum):
    """How a graph is shown."""

    TEXT = "text"
    MERMAID = "mermaid"
    SVG = "svg"


def show(
    graph: GraphArgument,
    overrides: Overrides = None,
    form: Annotated[
        Format, typer.Option("--format", help="Words, a Mermaid flowchart or an SVG picture.")
    ] = Format.TEXT,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the screen.")] = None,
    imports: Imports = None,
) -> None:
    """Show a graph: its levels in run order, what each reads and how, when it moves, what is held fixed."""
    from mlo import _draw
    from mlo.spec import load

    spec = load(graph, *with_options(overrides), imports=modules(imports))
    put({Format.TEXT: _draw.text, Format.MERMAID: _draw.mermaid, Format.SVG: _draw.svg}[form](spec), out)

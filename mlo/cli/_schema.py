"""`mlo schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mlo._errors import UserError
from mlo.cli._arguments import Imports, Overrides, modules, with_options
from mlo.cli._output import put


def schema(
    graph: Annotated[
        str | None, typer.Argument(metavar="[GRAPH]", help="Describe graphs of this graph's problem, with its data.")
    ] = None,
    overrides: Overrides = None,
    problem: Annotated[str | None, typer.Option(help="Describe graphs of this problem, with its default data.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the screen.")] = None,
    imports: Imports = None,
) -> None:
    """Print a JSON Schema of graph files, for completion and checks in an editor."""
    from mlo.spec._schema import schema as schema_of

    if graph is not None and problem is not None:
        raise UserError("a graph names its problem: give GRAPH or --problem, not both")
    names = modules(imports)
    tables = None
    if graph is not None or problem is not None:
        from mlo.spec import load
        from mlo.spec._problems import known_problem

        spec = load(graph, *with_options(overrides), imports=names) if graph is not None else None
        found = None if problem is None else known_problem(problem, names)
        from mlo.spec._tables import bare, tables_of

        tables = tables_of(spec or bare(found or "", names))
    put(json.dumps(schema_of(tables, names), indent=2, ensure_ascii=False), out)

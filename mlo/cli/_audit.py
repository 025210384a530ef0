"""`mlo audit`."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mlo._errors import UserError
from mlo.cli._arguments import Device, GraphArgument, Imports, Overrides, Seed, modules, with_options
from mlo.cli._export import Which
from mlo.cli._output import put


def audit(
    graph: GraphArgument,
    overrides: Overrides = None,
    at: Annotated[Path | None, typer.Option(metavar="RUN", help="A run folder: audit its trained state.")] = None,
    which: Annotated[Which, typer.Option(help="The checkpoint of --at.")] = Which.SELECTED,
    methods: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD", help='A row more: "{neumann: {terms: 5, step_size: 1e-3}}".'),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, metavar="N", help="Repeat on N draws: means and spreads.")] = 1,
    dense: Annotated[
        int, typer.Option(min=0, metavar="N", help="Write out the Hessian of levels of up to N numbers.")
    ] = 2_000,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the screen.")] = None,
    seed: Seed = None,
    device: Device = None,
    imports: Imports = None,
) -> None:
    """Hold every hypergradient method against references on a graph: how right each is there, and what it costs."""
    from mlo.spec import load
    from mlo.spec._registry import method_from

    changes = with_options(overrides, seed, device)
    more = [method_from(text, "--methods") for text in methods or ()]
    spec = load(graph, *changes, imports=modules(imports))
    if at is not None:
        from mlo._run import open_run

        trained = open_run(at).spec.seed
        if spec.seed != trained and any(change.partition("=")[0].strip() == "seed" for change in changes):
            raise UserError(
                f"--at {at}: it was run with seed {trained}, which decides its data; leave out seed={spec.seed}"
            )
    from mlo import _audit

    progress = Console(stderr=True)
    found = _audit.audit(spec, at=at, which=which.value, methods=more, draws=batches, dense=dense, console=progress)
    if as_json:
        put(found.to_json(), out)
        return
    if out is None:
        _audit.print_audit(found, Console())
        return
    text = StringIO()
    _audit.print_audit(found, Console(file=text, width=200))
    put(text.getvalue(), out)

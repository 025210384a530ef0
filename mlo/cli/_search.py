"""`mlo search`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mlo._errors import UserError
from mlo._search import Sampler
from mlo.cli._arguments import Device, GraphArgument, Imports, Overrides, modules, with_options
from mlo.cli._resume import INTERRUPTED
from mlo.cli._table import seeds_of

if TYPE_CHECKING:
    from mlo._search._space import Point


def search(
    graph: GraphArgument,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="A key and its values: 0.1:1.0:0.1 (first, last, step), log:1e-4:1e-1, or a list such as sgd,adam.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N", help="0 to N−1, or a list such as 0,3,5-7.")] = "1",
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A validation metric; by default the one by which the graph selects."),
    ] = None,
    maximise: Annotated[
        bool | None,
        typer.Option(
            "--maximise/--minimise",
            help="By default metrics named …loss, …error or …distance are minimised.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, metavar="T", help="How many; by default all combinations of the values.")
    ] = None,
    sampler: Annotated[
        Sampler | None, typer.Option(help="How trials are chosen: by default grid, and with --trials tpe.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, metavar="J", help="Cells that are run at once, each in a process.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the runs and of the result; runs/search/<name> if not given.")
    ] = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    imports: Imports = None,
) -> None:
    """Find the values of some keys that are best by a validation metric: trials × seeds, run what is missing."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a search runs each cell in one process: use --jobs in place of torchrun")
    from mlo._search import asked as asked_for
    from mlo._search import check_space, space_of

    changes = with_options(overrides, device=device)
    asked = asked_for(
        graph,
        tuple(changes),
        modules(imports),
        space=space_of(over or (), changes),
        seeds=seeds_of(seeds),
        metric=metric,
        maximise=maximise,
        sampler=sampler,
        trials=trials,
        out=out,
    )
    check_space(asked)
    from mlo._run._files import write_json
    from mlo._search._forms import json_of, print_found
    from mlo._search._make import attempt
    from mlo._search._plan import plan
    from mlo._search._result import find
    from mlo._table._work import holders

    tried: list[Point] = []
    interrupted = False
    try:
        attempt(asked, tried, Console(stderr=True, quiet=quiet), jobs=jobs)
    except KeyboardInterrupt:
        interrupted = True
    if not tried:
        raise KeyboardInterrupt
    found = find(asked, tuple(tried), holders(plan(asked, tuple(tried))))
    interrupted |= any(row.unfinished for row in found.table.rows)  # the workers were asked to stop, not this
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "search.json", json_of(found))
    if not quiet:
        print_found(found, Console())
    if interrupted:
        Console(stderr=True).print("interrupted; the same command goes on", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    if found.table.failures:
        raise typer.Exit(found.table.failures[0][2].code)

"""`mlo table`."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mlo._errors import UserError
from mlo.cli._arguments import Device, Imports, modules, with_options
from mlo.cli._resume import INTERRUPTED

if TYPE_CHECKING:
    from mlo._table._result import Table

_SEEDS = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*,?")
_MOST = 10_000
"""Seeds of one table."""


class Format(StrEnum):
    """How a table is printed."""

    TEXT = "text"
    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"


def table(
    graphs: Annotated[
        list[str],
        typer.Argument(
            metavar="GRAPH|KEY=VALUE",
            help="Graphs, as `run` takes them, and changes to all of them.",
            show_default=False,
        ),
    ],
    seeds: Annotated[str, typer.Option(metavar="N", help="0 to N−1, or a list such as 0,3,5-7.")],
    jobs: Annotated[int, typer.Option(min=1, metavar="J", help="Cells that are run at once, each in a process.")] = 1,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="What is compared: by default the test metric of what the control selects by."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="NAME", help="The control: the name of a graph, by default the first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the runs and of the table.")] = Path("runs/table"),
    form: Annotated[
        Format | None,
        typer.Option("--format", help="What is printed: text on a terminal, otherwise Markdown, if not given."),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for cells of other processes.")] = False,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    imports: Imports = None,
) -> None:
    """Run graphs × seeds, what is missing of them, and print means and paired differences."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a table runs each cell in one process: use --jobs in place of torchrun")
    files = tuple(each for each in graphs if not _is_change(each))
    if not files:
        raise UserError("a table needs a graph: python -m mlo table GRAPH… --seeds N")
    from mlo._table import Request, control_of, plan

    request = Request(
        graphs=files,
        seeds=seeds_of(seeds),
        out=out,
        changes=tuple(with_options([each for each in graphs if _is_change(each)], device=device)),
        imports=modules(imports),
    )
    planned = plan(request)
    control_of(planned, against)
    from mlo._table._cell import refuse_others
    from mlo._table._forms import write_table
    from mlo._table._make import make
    from mlo._table._result import tabulate
    from mlo._table._watch import Watch
    from mlo._table._work import holders

    progress = Console(stderr=True, quiet=quiet)
    refuse_others(planned)
    tabulate(planned, metrics=metric or (), against=against)  # a mistake in a name is found before anything is run
    interrupted = False
    with Watch(planned, progress) as watch:
        try:
            for how in make(partial(plan, request), planned, watch, jobs=jobs, patient=not no_wait):
                progress.print(f"a worker has died ({how}); others took over what it left", highlight=False)
        except KeyboardInterrupt:
            interrupted = True
    found = tabulate(planned, metrics=metric or (), against=against, holders=holders(planned))
    interrupted |= not no_wait and any(row.unfinished for row in found.rows)  # the workers were asked to stop, not this
    write_table(found, out)
    if not quiet:
        _print(found, form)
    if interrupted:
        Console(stderr=True).print("interrupted; the same command goes on", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    if found.failures:
        raise typer.Exit(found.failures[0][2].code)


def seeds_of(text: str) -> tuple[int, ...]:
    """`5` → 0 to 4, `0,3,5-7` → 0, 3, 5, 6, 7. Raises `UserError` for anything else."""
    wrong = f"--seeds {text}: expected how many, such as 5 for 0 to 4, or a list, such as 0,3,5-7"
    if not _SEEDS.fullmatch(text.strip()):
        raise UserError(wrong)
    if text.strip().isdecimal():
        bounds = [(0, int(text) - 1)]
    else:
        parts = [part.split("-") for part in text.strip().rstrip(",").split(",")]
        bounds = [(int(part[0]), int(part[-1])) for part in parts]
    if any(last < first for first, last in bounds):
        raise UserError(wrong)
    if sum(last - first + 1 for first, last in bounds) > _MOST:
        raise UserError(f"--seeds {text}: more than {_MOST:,}")
    return tuple(sorted({seed for first, last in bounds for seed in range(first, last + 1)}))


def _is_change(text: str) -> bool:
    return "=" in text and not Path(text).is_file()


def _print(found: Table, form: Format | None) -> None:
    from mlo._table._forms import csv_of, json_of, markdown_of
    from mlo._table._screen import print_table

    console = Console()
    if form is Format.TEXT or (form is None and console.is_terminal):
        print_table(found, console)
        return
    text = {Format.CSV: csv_of, Format.JSON: json_of}.get(form or Format.MARKDOWN, markdown_of)(found)
    typer.echo(text, nl=False)

"""`mlo resume`, and what becomes of Ctrl-C while a run goes."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

INTERRUPTED = 130


def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run that was broken off.")],
    device: Annotated[str | None, typer.Option(help="Go on there: cpu, cuda, cuda:1, mps.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Go on with a run from its last checkpoint, or from its start if there is none."""
    from mlo import _run

    with interruptible():
        _run.resume(folder, device=device, console=Console(quiet=quiet))


@contextmanager
def interruptible() -> Generator[None]:
    """Say in one line what an interrupt left behind and how to go on, which typer would swallow."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        line = str(interrupt) or "interrupted"
        first = os.environ.get("RANK", "0") == "0"  # of several processes, which are interrupted together
        Console(stderr=True, quiet=not first).print(line, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None

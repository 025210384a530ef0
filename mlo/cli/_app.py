"""The commands, and what becomes of an error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mlo._errors import MloError, explained
from mlo.cli._arguments import Device, GraphArgument, Imports, Overrides, Seed, modules, with_options
from mlo.cli._audit import audit
from mlo.cli._doctor import doctor
from mlo.cli._export import export
from mlo.cli._new import new
from mlo.cli._resume import INTERRUPTED, interruptible, resume
from mlo.cli._schema import schema
from mlo.cli._search import search
from mlo.cli._show import show
from mlo.cli._table import table

OUR_BUG = 1

app = typer.Typer(
    name="mlo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multi-level optimization declared as a graph of levels in YAML.",
    epilog="Exit codes: 0 done, 1 a bug of ours, 2 the specification or the command is wrong, 3 the numbers went wrong, "
    "4 the machine failed, 130 interrupted with a checkpoint saved.",
)


@app.callback()
def _mlo() -> None:  # pyright: ignore[reportUnusedFunction]
    """Multi-level optimization declared as a graph of levels in YAML."""


@app.command()
def run(
    graph: GraphArgument,
    overrides: Overrides = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/<name>-<seed>-<time> if not given.")] = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done and take no step.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    imports: Imports = None,
) -> None:
    """Run a graph of levels and keep what comes of it in a run folder."""
    from mlo.spec import load

    spec = load(graph, *with_options(overrides, seed, device), imports=modules(imports))
    console = Console(quiet=quiet)
    if dry_run:
        from mlo.cli._describe import describe
        from mlo.spec._build import assemble

        console.print(spec.to_yaml().rstrip(), highlight=False, markup=False, soft_wrap=True)
        console.print()
        describe(assemble(spec), console)
        return
    from mlo import _run

    with interruptible():
        _run.run(spec, out, console=console)


@app.command()
def check(
    graph: GraphArgument, overrides: Overrides = None, seed: Seed = None, device: Device = None, imports: Imports = None
) -> None:
    """Check a graph without running it: its order, what is differentiated, what is held fixed, what it costs."""
    from mlo.spec import load

    spec = load(graph, *with_options(overrides, seed, device), imports=modules(imports))
    from mlo.cli._describe import describe, probe
    from mlo.spec._build import assemble

    assembly = assemble(spec)
    probe(assembly)
    describe(assembly, Console())


for command in (resume, table, search, show, audit, export, new, schema, doctor):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (default: the process's own) and exit with the code that says what happened."""
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    try:
        code: object = app(arguments, standalone_mode=False)
    except Exception as error:
        return _report(error)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    return code if isinstance(code, int) else 0  # what a command left by `typer.Exit`


def _report(error: Exception) -> int:
    """Say what went wrong in the fewest words that help; the exit code for it."""
    shown: Any = error
    if os.environ.get("RANK", "0") != "0":  # one of several processes: another one may say it for all
        from mlo._run._processes import is_said

        if is_said(error):
            return int(getattr(shown, "exit_code", OUR_BUG))
    if hasattr(shown, "exit_code") and hasattr(shown, "show"):  # an error in the command itself, in typer's own words
        shown.show()
        return int(shown.exit_code)
    known = error if isinstance(error, MloError) else explained(error)
    if known is not None:
        _say("\n  ".join([str(known), *getattr(known, "__notes__", ())]))
        return known.exit_code
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    notes = getattr(error, "__notes__", None) or [_save_traceback(error)]
    _say("\n  ".join([f"a bug in mlo or in the problem: {type(error).__name__}: {error}", *notes]))
    return OUR_BUG


def _save_traceback(error: Exception) -> str:
    """Keep the traceback of an error that happened before there was a run folder, and say where."""
    path = Path("mlo-traceback.txt").absolute()
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"The traceback is in {path}."


def _say(message: str) -> None:
    Console(stderr=True).print(message, highlight=False, markup=False, soft_wrap=True)

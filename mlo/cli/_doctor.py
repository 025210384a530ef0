"""`mlo doctor`."""

from __future__ import annotations

import typer
from rich.console import Console

_SIGNS = {"NOBODY": "  ", "NOTICE": "? ", "INSTALLATION": "! ", "MACHINE": "! "}


def doctor() -> None:
    """Say what there is and what is wrong with it: versions, devices, problems, graphs, disk. Paste it when you ask."""
    from mlo._doctor import Blame, exit_code, findings

    console, found = Console(), []
    for finding in findings():
        found.append(finding)
        line = f"{_SIGNS[finding.blame.name]}{finding.what:<12} {finding.found}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    wrong = sum(finding.blame in (Blame.INSTALLATION, Blame.MACHINE) for finding in found)
    verdict = (
        "all is well" if not wrong else f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong, marked with !"
    )
    console.print(verdict, highlight=False, markup=False)
    if exit_code(found):
        raise typer.Exit(exit_code(found))

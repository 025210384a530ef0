"""An audit on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import rich.box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mlo._audit._report import Audit, LevelAudit, Row, Spectrum

OWN = "→ "
"""Before the level's own setting."""

_WIDEST = 500

_COLUMNS = {
    "cosine_unrolled": "cosine to\nunrolled",
    "error_unrolled": "\nerror",
    "cosine_implicit": "cosine to\nimplicit",
    "error_implicit": "\nerror",
    "residual": "\nresidual",
    "gradients": "\ngradients",
    "products": "\nproducts",
    "milliseconds": "\nms",
    "peak_bytes": "peak\nMiB",
}


def print_audit(audit: Audit, console: Console) -> None:
    """Every level: where it stands, a row for each method, what is to be said."""

    def say(line: str = "") -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    threads = f"{audit.threads} thread{'' if audit.threads == 1 else 's'}"
    say(f"{audit.name}: {audit.state}; seed {audit.seed}, {audit.dtype} on {audit.device}, {threads}")
    for level in audit.levels:
        say()
        for line in _heading(level):
            say(line)
        if level.failure is not None:
            continue
        table = _table(level)
        wide = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
        # Numbers that are cut off say nothing: where the screen is narrower, its lines wrap.
        whole = Console(file=console.file, width=max(wide, console.width), force_terminal=console.is_terminal)
        whole.print(table)
        for row in level.rows:
            if row.failure is not None:
                say(f"  {OWN if row.own else ''}{row.method}: {row.failure}")
        for finding in level.findings:
            say(f"  ! {finding}")
        say(f"  {level.advice}")


def _heading(level: LevelAudit) -> list[str]:
    steps = f"{level.steps} step{'' if level.steps == 1 else 's'}"
    draws = f"iteration{'' if len(level.iterations) == 1 else 's'} {', '.join(map(str, level.iterations))}"
    lines = [f"{level.level} below {level.upper}: {level.size:,} numbers, {steps} of {level.optimizer}, {draws}"]
    if level.failure is not None:
        return [*lines, f"  not audited: {level.failure}"]
    norms = {
        "‖∂f/∂w‖ at the response": level.gradient_norm,
        "before its steps": level.start_gradient_norm,
        "‖λ‖": level.cotangent_norm,
        f"loss of {level.upper}": level.upper_loss,
        f"‖d {level.upper}‖": level.total_norm,
        "of which direct": level.direct_norm,
    }
    reads = ", ".join(f"{name} ({size:,})" for name, size in level.reads.items())
    lines[0] += f"; pulled back to {reads}"
    lines.append("  " + ", ".join(f"{what} {norm:.3g}" for what, norm in norms.items() if norm is not None))
    if level.spectrum is not None:
        lines.append(f"  {_of_spectrum(level.spectrum)}")
    if level.reference is not None:
        solve = level.reference
        how = "the whole Hessian, solved" if solve.how == "dense" else "minimal residuals over a Krylov space"
        lines.append(
            f"  implicit reference: {how}; {solve.products:,} products, residual {solve.residual:.1e}; "
            f"a solution would change the loss of {level.upper} by {solve.gap:.1e}"
        )
    return lines


def _of_spectrum(spectrum: Spectrum) -> str:
    ends = (
        f"λ_min {spectrum.lambda_min:.3g} (± {spectrum.lambda_min_error:.1g}), "
        f"λ_max {spectrum.lambda_max:.4g} (± {spectrum.lambda_max_error:.1g})"
    )
    if spectrum.how == "dense":
        return f"{ends}, by the whole Hessian"
    state = "converged" if spectrum.converged else "not converged"
    return f"{ends}, Lanczos, {spectrum.products} products, {state} to {spectrum.tolerance:g} of the largest"


def _table(level: LevelAudit) -> Table:
    shown = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("\nmethod", no_wrap=True, overflow="fold")
    for heading in _COLUMNS.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in level.rows:
        if row.failure is None:
            shown.add_row(f"{OWN if row.own else '  '}{row.method}", *cells(row).values())
    return shown


def cells(row: Row) -> Mapping[str, str]:
    """The numbers of a row as they are shown, by the name of the field."""
    return {name: _cell(name, getattr(row, name), (row.spread or {}).get(name)) for name in _COLUMNS}


def _cell(name: str, number: float | None, spread: float | None) -> str:
    if number is None:
        return "–"
    around = ""
    match name:
        case "cosine_unrolled" | "cosine_implicit":
            around = "" if spread is None else f" ± {spread:.3f}"
            return f"{number:.4f}{around}"
        case "gradients" | "products":
            return f"{number:,.0f}" if number == round(number) else f"{number:,.1f}"
        case "milliseconds":
            return f"{number:.1f}" if number < 100 else f"{number:,.0f}"
        case "peak_bytes":
            return f"{number / 2**20:.2f}" if number < 100 * 2**20 else f"{number / 2**20:,.0f}"
        case _:
            around = "" if spread is None else f" ± {spread:.0e}"
            return f"{number:.1e}{around}"

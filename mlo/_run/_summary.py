"""The end of a run: `summary.json`, and the same on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.box
import torch
from rich.table import Table as Shown

from mlo._run._peak import peak_memory
from mlo._run._progress import progress_line
from mlo._run._record import git_commit, versions

if TYPE_CHECKING:
    from rich.console import Console

    from mlo._graph import Cost
    from mlo._problem import Table
    from mlo.spec._build import Assembly


def summarise(
    assembly: Assembly,
    *,
    spec_hash: str,
    selected: int,
    metrics: Mapping[str, float],
    counts: Cost,
    norms: Mapping[str, Any],
    tables: tuple[Table, ...],
    starts: Mapping[str, str],
    negative_curvature: Mapping[str, Any],
    warnings: Mapping[str, Mapping[str, str]],
    seconds: float,
    seconds_per_iteration: float | None,
    processes: int,
) -> dict[str, Any]:
    """Everything worth keeping about a finished run, as JSON holds it."""
    spec = assembly.spec
    return {
        "name": spec.name,
        "seed": spec.seed,
        "iterations": assembly.iterations,
        "selected": selected,
        "metrics": dict(metrics),
        "norms": norms,
        "negative_curvature": negative_curvature,
        "warnings": warnings,
        "counts": counts._asdict(),
        "predicted_counts": assembly.graph.cost(assembly.iterations)._asdict(),
        "tables": [
            {"title": table.title, "columns": table.columns, "rows": [list(row) for row in table.rows]}
            for table in tables
        ],
        "starts": dict(starts),
        "spec_hash": spec_hash,
        "versions": versions(),
        "git_commit": git_commit(),
        "processes": processes,
        "peak_memory": peak_memory(torch.device(spec.device)),
        "seconds": round(seconds, 3),
        "seconds_per_iteration": seconds_per_iteration,
    }


def print_summary(console: Console, summary: Mapping[str, Any], folder: Path, *, unselected: str | None = None) -> None:
    """The tables, the metrics of the selected state, the norms and the counts.

    - `unselected`: the metric that should have selected, and was never a number.
    """
    say = progress_line(console)
    for table in summary["tables"]:
        shown = Shown(title=table["title"], box=rich.box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for number, column in enumerate(table["columns"]):
            shown.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in table["rows"]:
            shown.add_row(*(_cell(value) for value in row))
        console.print(shown)
    if summary["metrics"]:
        shown = Shown(
            title=f"{'Last' if unselected else 'Selected'}: iteration {summary['selected']} of {summary['iterations']}",
            box=rich.box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
        )
        shown.add_column("metric")
        splits = sorted({name.split(".")[0] for name in summary["metrics"]}, reverse=True)
        for split in splits:
            shown.add_column(split, justify="right")
        for name in dict.fromkeys(name.split(".", 1)[1] for name in summary["metrics"]):
            shown.add_row(name, *(_cell(summary["metrics"].get(f"{split}.{name}")) for split in splits))
        console.print(shown)
    if unselected:
        say(f"nothing was selected: {unselected} was never a number; these are the last state's")
    for upper, norms in summary["norms"].items():
        through = "  ".join(f"through {lower} {norm:.3g}" for lower, norm in norms["through"].items())
        line = f"‖d {upper}‖, mean of {norms['updates']} updates: direct {norms['direct']:.3g}  {through}"
        say(line.rstrip())
    for level, met in summary["negative_curvature"].items():
        say(f"negative curvature in {met['negative']:,} of {met['pullbacks']:,} pullbacks of '{level}'")
    say(f"{_counted(summary['counts'], summary['predicted_counts'])} in {summary['seconds']:.1f} s")
    say(f"{folder}")


def _counted(counts: Mapping[str, int], predicted: Mapping[str, int]) -> str:
    """`80 gradients, 91 products (at most 120 predicted), 20 pullbacks`, or all of them `(as predicted)`."""

    def part(name: str) -> str:
        found, most = counts[name], predicted[name]
        differs = "" if found == most else f" ({'at most ' if found < most else ''}{most:,} predicted)"
        return f"{found:,} {name}{differs}"

    return ", ".join(map(part, counts)) + (" (as predicted)" if counts == predicted else "")


def _cell(value: str | float | None) -> str:
    match value:
        case None:
            return "–"
        case float():
            return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
        case _:
            return str(value)

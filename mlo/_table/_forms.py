"""A table as Markdown, CSV and JSON. Clocks stand last, under names that begin with `seconds`."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

from mlo._run._files import finite, write_atomically
from mlo._run._lock import alone
from mlo._table._result import UNFINISHED, Row, Table

LEFT = 2
"""Columns that hold words."""
_LONGEST = 90
"""Characters of a reason inside a table; the whole of it stands below."""

_HEADS = (
    *("metric", "graph", "seeds", "finished", "failed", "mean", "deviation"),
    *("against", "difference", "error", "t", "pairs", "gradients", "products", "pullbacks", "seconds"),
)


def columns(metric: str) -> list[str]:
    """The heads of a table's columns."""
    return [
        metric or "graph",
        "seeds",
        "mean ± deviation",
        "difference ± error",
        "t",
        "pairs",
        "gradients",
        "products",
        "seconds",
    ]


def cells(table: Table, metric: str) -> Iterator[list[str]]:
    """A row of words for each graph: numbers to as many decimals as the spreads have something to say about."""
    decimals = _decimals(table, metric)
    for row in table.rows:
        own, difference = table.spread(row, metric), table.difference(row, metric)
        yield [
            row.graph,
            _seeds(row, metric),
            "–" if own is None else _with_error(own.mean, own.deviation, decimals),
            "" if difference is None else _with_error(difference.mean, difference.error, decimals, sign="+"),
            "" if difference is None or difference.t is None else _t(difference.t),
            "" if difference is None else str(difference.n),
            _whole(row.mean_count("gradients")),
            _whole(row.mean_count("products")),
            "–" if row.mean_seconds is None else f"{row.mean_seconds:.1f}",
        ]


def remarks(table: Table) -> list[str]:
    """What stands below a table: how to read it, every failure in full, what is not finished."""
    seeds = f"Seed{'' if len(table.seeds) == 1 else 's'} {_ranges(table.seeds)}"
    pairs = f"; paired difference from {table.against} ± its standard error, t = difference / error"
    lines = [
        f"{seeds}. Mean ± standard deviation over seeds{pairs if len(table.rows) > 1 else ''}. "
        "Gradients and products: of one run, without pretraining. Seconds: of training."
    ]
    for graph, seed, failure in table.failures:
        lines.append(f"{graph}, seed {seed}, failed (exit code {failure.code}): {_one_line(failure.reason)}")
    for row in table.rows:
        for seed, who in row.unfinished.items():
            lines.append(f"{row.graph}, seed {seed}: {UNFINISHED}" + (f", in {who}" if who else ""))
    return [*lines, *table.notes]


def markdown_of(table: Table) -> str:
    """A table for each metric, then the remarks."""
    parts: list[str] = []
    for metric in table.metrics or ("",):
        heads = columns(metric)
        rule = ["---" if number < LEFT else "---:" for number in range(len(heads))]
        rows = [heads, rule, *cells(table, metric)]
        parts.append("\n".join(f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows))
    first, *rest = remarks(table)
    parts.append(first)
    if rest:
        parts.append("\n".join(f"- {line}" for line in rest))
    return "\n\n".join(parts) + "\n"


def csv_of(table: Table) -> str:
    """A line for each graph and metric; empty where a number is not defined."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADS)
    for metric in table.metrics:
        for row in table.rows:
            own, difference = table.spread(row, metric), table.difference(row, metric)
            counts = [row.mean_count(name) for name in ("gradients", "products", "pullbacks")]
            writer.writerow(
                [metric, row.graph, row.seeds, own.n if own else 0, len(row.failures(metric))]
                + ([own.mean, own.deviation] if own else [None, None])
                + [table.against]
                + ([difference.mean, difference.error, difference.t, difference.n] if difference else [None] * 4)
                + [*counts, row.mean_seconds]
            )
    return text.getvalue()


def json_of(table: Table) -> str:
    """Everything: also all metrics of every cell, and failures in parts."""
    data = {
        "format": 1,
        "seeds": table.seeds,
        "against": table.against,
        "metrics": table.metrics,
        "graphs": [_graph(table, row) for row in table.rows],
        "notes": table.notes,
    }
    return json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_table(table: Table, folder: Path) -> None:
    """`table.md`, `table.csv` and `table.json` in `folder`, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".table.lock", busy=lambda _: None):
        for ending, text in {"md": markdown_of, "csv": csv_of, "json": json_of}.items():
            write_atomically(folder / f"table.{ending}", text(table).encode())


def _graph(table: Table, row: Row) -> dict[str, Any]:
    return {
        "name": row.graph,
        "metrics": {
            metric: {
                **_dict(table.spread(row, metric)),
                "difference": _dict(table.difference(row, metric)) or None,
            }
            for metric in table.metrics
        },
        "gradients": row.mean_count("gradients"),
        "products": row.mean_count("products"),
        "pullbacks": row.mean_count("pullbacks"),
        "cells": [
            {
                "seed": seed,
                "spec_hash": run.summary["spec_hash"],
                "selected": run.summary["selected"],
                "metrics": run.summary["metrics"],
                "counts": run.summary["counts"],
                "warnings": run.summary.get("warnings", {}),
                "seconds": round(run.seconds, 3),
            }
            for seed, run in row.finished.items()
        ],
        "failed": [
            {"seed": seed, **{key: value for key, value in asdict(each).items() if key != "details"}}
            for seed, each in row.failed.items()
        ],
        "unfinished": list(row.unfinished),
        "seconds": row.mean_seconds,
    }


def _dict(value: Any) -> dict[str, Any]:
    return {} if value is None else asdict(value)


def _seeds(row: Row, metric: str) -> str:
    """`5`, or `4 of 5; seed 3 failed: level 'w', step 1: the loss is not finite`."""
    numbers, failures = row.values(metric), row.failures(metric)
    if len(numbers) == row.seeds:
        return str(row.seeds)
    parts = [f"{len(numbers)} of {row.seeds}"]
    parts += [f"seed {seed} failed: {_short(failure.reason)}" for seed, failure in failures.items()]
    if row.unfinished:
        left = f"seed{'' if len(row.unfinished) == 1 else 's'} {_ranges(tuple(row.unfinished))}"
        parts.append(f"{left} {UNFINISHED}")
    return "; ".join(parts)


def _decimals(table: Table, metric: str) -> int:
    """So many that a spread of usual size in this table shows two digits, and a mean no more than five."""
    means = [each.mean for row in table.rows if (each := table.spread(row, metric))]
    spreads = [each.deviation for row in table.rows if (each := table.spread(row, metric))]
    spreads += [each.error for row in table.rows if (each := table.difference(row, metric))]
    largest = _places(max(map(abs, means), default=0.0) or 1.0)
    positive = [each for each in spreads if each]
    wanted = 1 - _places(median(positive)) if positive else 3 - largest
    return min(max(wanted, 0), max(4 - largest, 0))


def _places(value: float) -> int:
    """The power of ten of its first digit."""
    return math.floor(math.log10(value))


def _with_error(mean: float, error: float | None, decimals: int, sign: str = "") -> str:
    text = f"{mean:{sign}.{decimals}f}".replace("-", "−")
    return text if error is None else f"{text} ± {error:.{decimals}f}"


def _t(value: float) -> str:
    text = f"{value:+.1f}" if abs(value) < 1000 else f"{value:+.1e}"
    return text.replace("inf", "∞").replace("-", "−")


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _ranges(seeds: tuple[int, ...]) -> str:
    """`0–4, 7`."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    """What is wrong, without what often helps."""
    line = _one_line(text).partition("; ")[0]
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")

"""The trials of a search on the screen and as JSON, and what to copy."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import rich.box
from rich.table import Table as Shown
from rich.text import Text

from mlo._run._progress import progress_line
from mlo._search._space import Choices, heads
from mlo._table._forms import cells, columns, remarks
from mlo._table._screen import print_whole
from mlo._table._statistics import Paired

if TYPE_CHECKING:
    from rich.console import Console

    from mlo._search._asked import Asked
    from mlo._search._result import Found
    from mlo._search._space import Dimension
    from mlo._table._result import Row

_LEFT_OUT = ("gradients", "products")
_COMPARED = ("difference ± error", "t", "pairs")
"""Columns that say nothing where there is no best trial."""
_MARK = "←"


def print_found(found: Found, console: Console) -> None:
    """The trials, best first, then how sure the choice is, and last the line to copy."""
    asked = found.asked
    names, numbers = heads(asked.space), columns(asked.metric)[1:]
    left_out = _LEFT_OUT if found.best else (*_LEFT_OUT, *_COMPARED)
    kept = [each not in left_out for each in numbers]
    shown = Shown(box=rich.box.SIMPLE_HEAD, title=Text(_title(asked)), title_justify="left", title_style="bold")
    for name in names:
        shown.add_column(Text(name), no_wrap=True)
    for head in (each for each, keep in zip(numbers, kept, strict=True) if keep):
        shown.add_column(Text(head), justify="right", no_wrap=head != "seeds")
    shown.add_column("")
    for row, (_, *texts) in zip(found.table.rows, cells(found.table, asked.metric), strict=True):
        best = row is found.best
        values = [change.partition("=")[2] for change in found.points[row.graph]]
        parts = [
            *values,
            *(each for each, keep in zip(texts, kept, strict=True) if keep),
            f"{_MARK} best" if best else "",
        ]
        shown.add_row(*map(Text, parts), style="bold" if best else "")
    print_whole(shown, console)
    say = progress_line(console)
    for line in sentences(found):
        say(line)
    if found.best is not None:
        say("\nto put on run or table:")
        say(overrides(found, found.best))


def sentences(found: Found) -> Iterator[str]:
    """How to read the table, how close the others are, and every failure in full."""
    asked, (_, *rest) = found.asked, remarks(found.table)
    seeds = f"{len(asked.seeds)} seed{'' if len(asked.seeds) == 1 else 's'}"
    pairs = "; paired difference from the best ± its standard error, t = difference / error" if found.best else ""
    yield f"Mean ± standard deviation over {seeds}{pairs}. Seconds: of training."
    if found.best is None:
        yield "no trial has a number for every seed: there is no best one"
    elif len(found.complete) > 1:
        yield _second(found)
        yield _flatness(found)
    yield from rest


def overrides(found: Found, row: Row) -> str:
    """The values of a trial as a shell takes them."""
    return shlex.join(found.points[row.graph])


def json_of(found: Found) -> dict[str, Any]:
    """Everything, the trials by merit."""
    asked = found.asked
    return {
        "format": 1,
        "graph": asked.name,
        "changes": asked.changes,
        "over": {each.key: _dimension(each) for each in asked.space},
        "metric": asked.metric,
        "direction": "maximise" if asked.maximise else "minimise",
        "sampler": asked.sampler.value,
        "seeds": asked.seeds,
        "best": list(found.points[found.best.graph]) if found.best else None,
        "ties": [list(found.points[row.graph]) for row in found.ties],
        "close": [list(found.points[row.graph]) for row in found.close] if len(asked.seeds) > 1 else None,
        "trials": [_trial(found, row) for row in found.table.rows],
        "notes": found.table.notes,
    }


def _trial(found: Found, row: Row) -> dict[str, Any]:
    metric = found.asked.metric
    spread, difference = found.table.spread(row, metric), found.table.difference(row, metric)
    return {
        "overrides": list(found.points[row.graph]),
        "mean": spread and spread.mean,
        "deviation": spread and spread.deviation,
        "difference": asdict(difference) if difference and found.best else None,
        "values": {str(seed): value for seed, value in row.values(metric).items()},
        "failed": {str(seed): each.reason for seed, each in row.failures(metric).items()},
        "unfinished": list(row.unfinished),
        "seconds": row.mean_seconds,
    }


def _dimension(dimension: Dimension) -> Any:
    if isinstance(dimension, Choices):
        return list(dimension.texts)
    return {"low": dimension.low, "high": dimension.high}


def _title(asked: Asked) -> str:
    better = "larger" if asked.maximise else "smaller"
    return f"{asked.name}: {asked.metric}, {better} is better"


def _second(found: Found) -> str:
    second = found.complete[1]
    difference = found.table.difference(second, found.asked.metric)
    assert difference is not None, "both have every seed"
    return f"second: {second.graph}: {_difference(difference)}"


def _difference(difference: Paired) -> str:
    if difference.error is None:
        text = f"{difference.mean:+.4g} from the best on one seed, which says nothing of other seeds"
    elif difference.t is None:
        text = f"the same as the best on every one of {difference.n} seeds"
    else:
        error, t = f"{difference.error:.2g}", f"{difference.t:+.1f}"
        text = f"{difference.mean:+.4g} ± {error} from the best over {difference.n} pairs (t = {t})"
    return text.replace("-", "−").replace("inf", "∞")


def _flatness(found: Found) -> str:
    others, ties = len(found.complete) - 1, len(found.ties)
    tied = f"; {ties} with exactly its mean, of which the first in order is taken" if ties else ""
    if len(found.asked.seeds) == 1:
        return f"{others + 1} trials on one seed: how far the choice depends on it needs more --seeds{tied}"
    return f"{len(found.close)} of {others} others are no further from the best than |t| < 2{tied}"

"""What has come of a search: its trials by merit, the best, and how close the others are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from mlo._search._plan import label, plan
from mlo._table._result import Row, Table, tabulate

if TYPE_CHECKING:
    from mlo._search._asked import Asked
    from mlo._search._space import Point

_DIGITS = 12
"""To which means are compared: what differs by the rounding of a sum is the same."""
_SIGNIFICANT = 2.0
"""|t| from which a difference is more than seeds often make."""


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """The trials so far.

    - `points`: by the name of a trial, its values.
    - `table`: a row for each trial, best first and ties in the order of the trials, compared with the first. Those that
      lack a seed come last: it may be the hard one.
    - `complete`: the first rows, which have a number for every seed: these may be compared.
    """

    asked: Asked
    points: Mapping[str, Point]
    table: Table
    complete: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """None where no trial is complete."""
        return self.complete[0] if self.complete else None

    @property
    def ties(self) -> list[Row]:
        """Other trials whose mean is that of the best."""
        return [row for row in self.complete[1:] if merit(row, self.asked) == merit(self.complete[0], self.asked)]

    @property
    def close(self) -> list[Row]:
        """The other complete trials whose paired difference from the best is none, or |t| < 2."""
        differences = [(row, self.table.difference(row, self.asked.metric)) for row in self.complete[1:]]
        return [row for row, each in differences if each and (not each.mean or abs(each.t or 0.0) < _SIGNIFICANT)]


def find(asked: Asked, points: tuple[Point, ...], holders: Mapping[tuple[str, int], str] | None = None) -> Found:
    """What the folder of a search holds of `points`.

    - `holders`: by trial and seed, who is working on what is not finished.

    Raises `UserError` for a metric that a finished run does not have.
    """
    table = tabulate(plan(asked, points), metrics=(asked.metric,), holders=holders)
    sign = -1 if asked.maximise else 1
    whole = [row for row in table.rows if len(row.values(asked.metric)) == row.seeds]
    rows = sorted(whole, key=lambda row: sign * merit(row, asked))
    ordered = (*rows, *(row for row in table.rows if row not in whole))
    return Found(
        asked=asked,
        points={label(point): point for point in points},
        table=replace(table, rows=ordered, against=ordered[0].graph),
        complete=tuple(rows),
    )


def merit(row: Row, asked: Asked) -> float:
    """The mean over seeds."""
    values = row.values(asked.metric)
    return float(f"{sum(values.values()) / len(values):.{_DIGITS}g}")

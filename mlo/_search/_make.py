"""Run trials, as cells of a table."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from mlo._search._asked import Sampler
from mlo._search._plan import check_problem, plan
from mlo._search._trials import drawn, proposed
from mlo._table._cell import refuse_others
from mlo._table._make import make
from mlo._table._result import tabulate
from mlo._table._watch import Watch

if TYPE_CHECKING:
    from rich.console import Console

    from mlo._search._asked import Asked
    from mlo._search._space import Point


def attempt(asked: Asked, tried: list[Point], console: Console, *, jobs: int) -> None:
    """Run what is missing of every trial. `tried` grows by each of them before it begins, and keeps them if this raises.

    Trials that do not depend on each other are run together, others one after the other. Raises what `make` raises.
    """
    check = cache(partial(check_problem, asked))

    def run(points: tuple[Point, ...]) -> None:
        planned = plan(asked, points)
        refuse_others(planned)
        tried.extend(points)
        with Watch(planned, console, "trial") as watch:
            for how in make(partial(plan, asked, points), planned, watch, jobs=jobs, check=lambda _: check()):
                console.print(f"a worker has died ({how}); others took over what it left", highlight=False)

    def value(point: Point) -> float | None:
        run((point,))
        return complete(asked, point)

    if asked.sampler is Sampler.TPE:
        proposed(asked, value)
    else:
        run(drawn(asked))


def complete(asked: Asked, point: Point) -> float | None:
    """The mean over all seeds; None if one of them has no number."""
    table = tabulate(plan(asked, (point,)), metrics=(asked.metric,))
    (row,) = table.rows
    found = table.spread(row, asked.metric)
    return found.mean if found is not None and found.n == len(asked.seeds) else None

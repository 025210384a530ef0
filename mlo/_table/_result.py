"""What has come of a plan: for each graph its finished, failed and unfinished cells, and what is computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mlo._errors import UserError
from mlo._table._cell import NUMBERS, Failure, Finished, standing
from mlo._table._plan import control_of
from mlo._table._statistics import Paired, Spread, paired, spread
from mlo.spec._faults import unknown

if TYPE_CHECKING:
    from mlo._table._plan import Plan

UNFINISHED = "not finished"


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One graph.

    - `finished`, `failed`: by seed. `unfinished`: the other seeds, and who is working on them, if anybody is.
    """

    graph: str
    finished: Mapping[int, Finished]
    failed: Mapping[int, Failure]
    unfinished: Mapping[int, str | None]

    @property
    def seeds(self) -> int:
        """How many were asked for."""
        return len(self.finished) + len(self.failed) + len(self.unfinished)

    def values(self, metric: str) -> dict[int, float]:
        """By seed, what is a number of `metric`."""
        found = {seed: run.numbers.get(metric) for seed, run in self.finished.items()}
        return {seed: float(value) for seed, value in found.items() if value is not None and math.isfinite(value)}

    def failures(self, metric: str) -> dict[int, Failure]:
        """By seed, why there is no number of `metric`: the failed cells, and those where it is not finite."""
        values = self.values(metric)
        nothing = Failure(code=NUMBERS, reason=f"{metric} is not finite")
        return dict(sorted({**self.failed, **{s: nothing for s in self.finished if s not in values}}.items()))

    def mean_count(self, name: str) -> float | None:
        """`gradients`, `products` or `pullbacks` of a run, averaged over the finished ones."""
        return _mean({seed: run.summary["counts"][name] for seed, run in self.finished.items()})

    @property
    def mean_seconds(self) -> float | None:
        """Of training, averaged over the finished ones."""
        return _mean({seed: run.seconds for seed, run in self.finished.items()})


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows in the order of the command, what is compared, and the graph it is compared with."""

    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    against: str
    rows: tuple[Row, ...]

    def spread(self, row: Row, metric: str) -> Spread | None:
        """Mean and standard deviation over the finished seeds of `row`."""
        return spread(row.values(metric))

    def difference(self, row: Row, metric: str) -> Paired | None:
        """From the control, over the seeds that both have finished; None for the control itself."""
        control = next(each for each in self.rows if each.graph == self.against)
        return None if row is control else paired(row.values(metric), control.values(metric))

    @property
    def failures(self) -> list[tuple[str, int, Failure]]:
        """Graph, seed and reason of every cell without its numbers, in the order of the rows."""
        found: dict[tuple[str, int], Failure] = {}
        for row in self.rows:
            for metric in self.metrics or ("",):
                found = {**{(row.graph, seed): each for seed, each in row.failures(metric).items()}, **found}
        order = [row.graph for row in self.rows]
        return sorted(((*key, each) for key, each in found.items()), key=lambda each: (order.index(each[0]), each[1]))

    @property
    def notes(self) -> list[str]:
        """What must be known to read the numbers."""
        summaries = [run.summary for row in self.rows for run in row.finished.values()]
        made = {
            name: {str(summary["versions"].get(name)) for summary in summaries}
            for name in ("mlo", "torch", "numpy", "python")
        }
        made["commit"] = {str(summary["git_commit"])[:12] for summary in summaries}
        mixed = [f"{name} {' and '.join(sorted(found))}" for name, found in made.items() if len(found) > 1]
        notes = [f"made with different versions: {', '.join(mixed)}"] if mixed else []
        for row in self.rows:
            warned = [seed for seed, run in row.finished.items() if run.summary.get("warnings")]
            kinds = {
                f"{level}: {kind}"
                for seed in warned
                for level, given in row.finished[seed].summary["warnings"].items()
                for kind in given
            }
            if warned:
                seeds = f"seed{'' if len(warned) == 1 else 's'} {', '.join(map(str, warned))}"
                notes.append(f"{row.graph}: warnings in {seeds} ({', '.join(sorted(kinds))}); see summary.json")
        return notes


def tabulate(
    plan: Plan,
    *,
    metrics: Sequence[str] = (),
    against: str | None = None,
    holders: Mapping[tuple[str, int], str] | None = None,
) -> Table:
    """What the folders of `plan` hold.

    - `metrics`: default, the test counterpart of what the control selects by, or its first test metric.
    - `against`: the control; default, the first graph.
    - `holders`: by graph and seed, who is working on what is not finished.

    Raises `UserError` for a metric that a finished run does not have, and for a control that is none of the graphs.
    """
    rows: list[Row] = []
    for graph in plan.graphs:
        found = {cell.seed: standing(cell) for cell in plan.of(graph)}
        rows.append(
            Row(
                graph=graph,
                finished={seed: each for seed, each in found.items() if isinstance(each, Finished)},
                failed={seed: each for seed, each in found.items() if isinstance(each, Failure)},
                unfinished={seed: (holders or {}).get((graph, seed)) for seed, each in found.items() if each is None},
            )
        )
    control = control_of(plan, against)
    chosen = tuple(dict.fromkeys(metrics)) or _default_metrics(plan, rows, control)
    for row in rows:
        for run in row.finished.values():
            for metric in chosen:
                if metric not in run.numbers:
                    raise UserError(f"{row.graph}: {unknown('metric', metric, run.numbers)}")
    return Table(seeds=plan.seeds, metrics=chosen, against=control, rows=tuple(rows))


def _default_metrics(plan: Plan, rows: Sequence[Row], control: str) -> tuple[str, ...]:
    evaluation = plan.of(control)[0].spec.evaluation
    select = evaluation.select if evaluation else None
    test = f"test.{select.removeprefix('validation.')}" if select else None
    first = sorted(rows, key=lambda row: row.graph != control)
    run = next((run for row in first for run in row.finished.values()), None)
    if run is None:
        return (test,) if test else ()
    known = list(run.summary["metrics"])
    wanted = [test, select, *(name for name in known if name.startswith("test.")), *known]
    return tuple(name for name in wanted if name is not None and name in known)[:1]


def _mean(values: Mapping[int, float]) -> float | None:
    found = spread(values)
    return found and found.mean

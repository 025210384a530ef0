"""What a search was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, final

from mlo._errors import UserError, nearest
from mlo._problem import smaller_is_better
from mlo._search._space import MOST, Space, size_of
from mlo._table._plan import folder_name
from mlo.spec import load
from mlo.spec._nodes import fold

if TYPE_CHECKING:
    from mlo.spec import Spec

_SPLIT = "validation."


class Sampler(StrEnum):
    """How trials are chosen: all of them, at random, or by a tree-structured Parzen estimator from what came of others."""

    GRID = "grid"
    RANDOM = "random"
    TPE = "tpe"


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """A search, as plain data: another process reads the same from it.

    - `graph`: a file, or the name of a graph that comes with mlo; `name`: what it calls itself.
    - `changes`: `key=value`, for all trials.
    - `metric`: of the validation split; `maximise`: whether more of it is better.
    - `trials`: how many different ones.
    - `out`: the folder of the search.
    """

    graph: str
    name: str
    changes: tuple[str, ...]
    imports: tuple[str, ...]
    space: Space
    seeds: tuple[int, ...]
    metric: str
    maximise: bool
    sampler: Sampler
    trials: int
    out: Path

    def base(self) -> Spec:
        """The graph that every trial changes."""
        return load(self.graph, *self.changes, imports=self.imports)


def asked(
    graph: str,
    changes: tuple[str, ...],
    imports: tuple[str, ...],
    *,
    space: Space,
    seeds: tuple[int, ...],
    metric: str | None,
    maximise: bool | None,
    sampler: Sampler | None,
    trials: int | None,
    out: Path | None,
) -> Asked:
    """A search, in which what is not given is taken from the graph and from what is searched.

    Raises `SpecError` for mistakes in the graph, `UserError` for what cannot be searched so.
    """
    for change in changes:
        if fold(change.partition("=")[0].strip()) == "seed":
            raise UserError(f"{change}: the seeds of a search are those of --seeds")
    spec = load(graph, *changes, imports=imports)
    if spec.evaluation is None:
        raise UserError(f"{graph}: has no `evaluation`, so there is nothing to search by")
    chosen = _metric(graph, metric or spec.evaluation.select)
    how, count = _trials(space, sampler, trials)
    folder = out or Path("runs") / "search" / folder_name(spec.name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; choose another with --out")
    return Asked(
        graph=graph,
        name=spec.name,
        changes=changes,
        imports=imports,
        space=space,
        seeds=seeds,
        metric=chosen,
        maximise=not smaller_is_better(chosen) if maximise is None else maximise,
        sampler=how,
        trials=count,
        out=folder,
    )


def _metric(graph: str, metric: str | None) -> str:
    if metric is None:
        raise UserError(
            f"{graph}: selects by no metric: say with --metric what is searched by, such as validation.top1"
        )
    if metric.startswith("test."):
        raise UserError(
            f"--metric {metric}: a search looks at validation metrics only: settings chosen on the test images are fitted "
            "to them, and their test accuracy no longer says what new images would. "
            f"Did you mean '{_SPLIT}{metric.removeprefix('test.')}'?"
        )
    if not metric.startswith(_SPLIT):
        near = nearest(metric.partition(".")[0], [_SPLIT.rstrip(".")])
        raise UserError(f"--metric {metric}: expected a metric of the validation split, {_SPLIT}NAME.{near}")
    return metric


def _trials(space: Space, sampler: Sampler | None, trials: int | None) -> tuple[Sampler, int]:
    size = size_of(space)
    how = sampler or (Sampler.GRID if size is not None and trials is None else Sampler.TPE)
    if how is Sampler.GRID:
        if size is None:
            raise UserError(
                "--sampler grid: log:LOW:HIGH is continuous and has no grid: FIRST:LAST:STEP has, or a list"
            )
        if trials is not None:
            raise UserError(
                f"--trials {trials}: a grid takes all {size:,}; leave it out, or choose --sampler random or tpe"
            )
        return how, size
    if trials is None:
        raise UserError(f"--trials is missing: how many the sampler {how.value} takes")
    if trials > (size or MOST):
        most = f"there are {size:,} combinations" if size else f"more than {MOST:,}"
        raise UserError(f"--trials {trials}: {most}" + ("; --sampler grid takes all" if size else ""))
    return how, trials

"""Which runs a table is made of, and where each of them lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final
from urllib.parse import quote

from mlo._errors import SpecError, UserError, nearest
from mlo.spec import load
from mlo.spec._nodes import fold

if TYPE_CHECKING:
    from mlo.spec import Spec


@final
@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, as plain data: another process plans the same from it.

    - `graphs`: files, or names of graphs that come with mlo.
    - `changes`: `key=value`, for all of them.
    - `out`: the folder of the table.
    """

    graphs: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    changes: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Cell:
    """One graph with one seed: a run in a folder of its own, `<out>/<graph>/seed-<n>`."""

    graph: str
    seed: int
    spec: Spec
    folder: Path

    @cached_property
    def identity(self) -> str:
        """The hash of its specification."""
        return self.spec.hash

    @property
    def lock(self) -> Path:
        """Held by the process that is working on it."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    def __str__(self) -> str:
        return f"{self.graph}, seed {self.seed}"


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a table: all graphs of the first seed, then those of the next."""

    out: Path
    graphs: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    def of(self, graph: str) -> list[Cell]:
        """The cells of one graph, by seed."""
        return [cell for cell in self.cells if cell.graph == graph]


def plan(request: Request) -> Plan:
    """Read every graph with every seed. Imports neither torch nor any problem.

    Raises `SpecError` with the mistakes of all graphs, `UserError` for graphs that cannot be told apart or compared.
    """
    if request.out.exists() and not request.out.is_dir():
        raise UserError(f"{request.out}: not a folder; choose another with --out")
    for change in request.changes:
        if fold(change.partition("=")[0].strip()) == "seed":
            raise UserError(f"{change}: the seeds of a table are those of --seeds")
    graphs: dict[str, Spec] = {}
    files: dict[str, str] = {}
    mistakes: dict[str, list[str]] = {}
    for text in request.graphs:
        try:
            spec = load(text, *request.changes, imports=request.imports)
        except SpecError as error:
            mistakes.setdefault(str(error), []).append(text)
            continue
        place = folder_name(spec.name).casefold()
        if place in files:
            twice = "given twice" if files[place] == text else f"named '{spec.name}', as {files[place]} is"
            raise UserError(
                f"{text}: {twice}; a table knows its graphs by name: leave one out, or give it another `name:`"
            )
        if spec.evaluation is None:
            raise UserError(f"{text}: has no `evaluation`, so there is nothing to compare")
        files[place], graphs[spec.name] = text, spec
    if mistakes:
        raise SpecError(told(mistakes, len(request.graphs)))
    cells = tuple(
        Cell(name, seed, spec.replaced(f"seed={seed}"), request.out / folder_name(name) / f"seed-{seed}")
        for seed in request.seeds
        for name, spec in graphs.items()
    )
    return Plan(out=request.out, graphs=tuple(graphs), seeds=request.seeds, cells=cells)


def told(mistakes: Mapping[str, Sequence[str]], graphs: int) -> str:
    """Every mistake once, with the graphs that have it where not all of `graphs` do and a change shows none."""

    def line(mistake: str, where: Sequence[str]) -> str:
        return f"{', '.join(where)}: {mistake}" if mistake.startswith("<") and len(where) < graphs else mistake

    return "\n".join(line(mistake, where) for mistake, where in mistakes.items())


def control_of(plan: Plan, against: str | None) -> str:
    """The graph that others are compared with. Raises `UserError` for one that is not there."""
    if against is None:
        return plan.graphs[0]
    if against not in plan.graphs:
        known = ", ".join(plan.graphs)
        raise UserError(f"--against {against}: none of the graphs.{nearest(against, plan.graphs)}\n  Known: {known}.")
    return against


def folder_name(name: str) -> str:
    """A graph's name as one folder's, whatever is in it."""
    quoted = quote(name, safe=" ")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted

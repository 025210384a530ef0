"""What is shown while cells are made: a line for what happens, and on a terminal one that moves for each that is running."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, final

from rich.live import Live
from rich.text import Text

from mlo._run._log import METRICS
from mlo._run._progress import progress_line
from mlo._table._cell import Failure, standing
from mlo._table._work import Event, Kind

if TYPE_CHECKING:
    from rich.console import Console

    from mlo._table._plan import Cell, Plan

_TAIL = 1 << 16
"""Bytes at the end of a file, in which its last line lies."""


@final
class Watch:
    """Called with every event; a context in which the moving lines are drawn.

    - `what`: what a row of the plan is called.
    """

    def __init__(self, plan: Plan, console: Console, what: str = "graph") -> None:
        self._cells = {(cell.graph, cell.seed): cell for cell in plan.cells}
        self._running: dict[tuple[str, int], Cell] = {}
        self._say = progress_line(console)
        self._live = (
            Live(console=console, get_renderable=self._lines, refresh_per_second=2, transient=True)
            if console.is_terminal and not console.quiet
            else None
        )
        graphs, seeds = _counted(len(plan.graphs), what), _counted(len(plan.seeds), "seed")
        failed = sum(isinstance(standing(cell), Failure) for cell in plan.cells)
        self._say(
            f"{graphs} × {seeds} in {plan.out}: {self._done()} of {len(plan.cells)} are done"
            + (f", {failed} of them failed" if failed else "")
        )

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Say what has happened."""
        key = (event.graph, event.seed)
        name = str(self._cells[key])
        if event.kind is Kind.HELD:
            self._say(f"{name}: is being run by {event.text}")
            return
        if event.kind is Kind.BEGINS:
            self._running[key] = self._cells[key]
            self._say(f"{name}: {event.text}")
            return
        self._running.pop(key, None)
        self._say(f"{name}: {event.kind.value} {self._how(event)}")

    def _done(self) -> int:
        """Other processes make cells too."""
        return sum(standing(cell) is not None for cell in self._cells.values())

    def _how(self, event: Event) -> str:
        count = f"({self._done()} of {len(self._cells)})"
        return f"{count}: {event.text}" if event.kind is Kind.FAILED else f"in {event.text} {count}"

    def _lines(self) -> Text:
        return Text("\n".join(f"{cell}: {_where(cell)}" for cell in list(self._running.values())))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _where(cell: Cell) -> str:
    iteration = _last_iteration(cell.folder / METRICS)
    if iteration is None:
        return "before its first iteration" + (" (or running what it starts from)" if cell.spec.starts else "")
    total = cell.spec.iterations
    return f"iteration {iteration:,}" + (f" of {total:,}" if isinstance(total, int) else "")


def _last_iteration(path: Path) -> int | None:
    """Of the last whole line; None if there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(-min(_TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
            whole = file.read().rpartition(b"\n")[0]
        return int(json.loads(whole.rpartition(b"\n")[2])["iteration"])
    except (OSError, ValueError, KeyError):
        return None
